"""From raw interaction files to Parquet rows with their candidate sets."""
