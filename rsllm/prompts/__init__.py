"""From rows of items to token ids: templates, encoding, batches."""
