"""Where work runs: a Ray that is there or is started, and how much of it each run takes."""
