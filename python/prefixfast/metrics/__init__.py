"""Metrics of generated text, one file for each metric or script."""
