"""Data sets and backbones by name: what there is, and how to get it."""
