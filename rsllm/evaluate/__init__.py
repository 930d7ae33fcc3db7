"""From scores and answers to metrics, statistics and the report."""
