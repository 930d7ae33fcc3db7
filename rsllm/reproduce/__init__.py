"""A paper's tables and figures: a grid of data sets, methods and claims, one small file a cell."""
