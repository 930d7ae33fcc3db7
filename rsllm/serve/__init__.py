"""The endpoint on Ray Serve, for one machine and for a cluster."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""The names of this machine for itself."""
