"""Training of prefixes: many prefixes share the batches, and each gets the result that it has alone."""
