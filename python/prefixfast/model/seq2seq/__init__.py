"""Encoder-decoder models: their attention sites, packed calls of their stacks, tokens, and one file for each kind."""
