"""Finished artifacts are kept here, each under a key that its sources decide."""
