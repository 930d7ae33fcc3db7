"""Finds or starts the Ray that work runs on, and divides it between runs."""
