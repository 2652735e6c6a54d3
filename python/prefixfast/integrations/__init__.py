"""Adapters to other libraries. Each imports its library where it is used."""
