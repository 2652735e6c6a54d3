"""Attention kernels of prefixfast and their specification. The package imports torch and, where installed, triton."""
