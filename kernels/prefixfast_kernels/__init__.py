"""The attention kernels of prefixfast and their specification; imports torch (and, when built, triton) only."""
