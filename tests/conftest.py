"""Shared settings."""

import torch

# The models are tiny: a second thread only adds barriers, which cost milliseconds each on a busy machine.
torch.set_num_threads(1)
