"""Trained weights in an attached base model for the time of a call: adapters, LoRA and weights of the base itself."""
