"""Comparison of methods on one's own rows: quality, and what each method costs for a user."""
