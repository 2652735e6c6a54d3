"""Training: rows in packed batches, all prefixes of a run at once."""
