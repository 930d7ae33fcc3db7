"""The language model with item slots: backbone, projector, branches, losses."""
