"""Generation and scoring: requests with any mix of prefixes, packed into batches over one frozen base model."""
