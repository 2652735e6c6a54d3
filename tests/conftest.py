"""Shared settings."""

import os

import torch

if (
    not torch.cuda.is_available()
):  # the Triton kernels run in Triton's interpreter; it must be said before they are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The models are tiny: a second thread only adds barriers, which cost milliseconds each on a busy machine.
torch.set_num_threads(1)
