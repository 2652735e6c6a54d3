"""Measurements that `prefixfast bench` runs, one module for each suite."""
