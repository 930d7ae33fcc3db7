"""Search over experiments: Ray Tune + Optuna, a live table, and the study that judges a winner."""
