"""What `prefixfast bench` runs."""
