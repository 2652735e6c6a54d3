"""The learned prefix: its tensors, its folder, PEFT's format, and what is made from it."""
