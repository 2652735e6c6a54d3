"""Formats of other libraries, to the bit; tensors and JSON only, nothing of ours is imported here but the errors."""
