"""Finished artifacts, each under the key of what it was made of."""
