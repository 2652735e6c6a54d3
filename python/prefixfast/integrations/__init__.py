"""Adapters to other libraries; each imports its library where it is used."""
