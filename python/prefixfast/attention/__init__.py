"""The `Plan` of a packed forward, the attention operators, their backends, and the function registered with transformers."""
