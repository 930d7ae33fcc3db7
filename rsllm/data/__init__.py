"""Raw interaction files become Parquet rows with their candidate sets."""
