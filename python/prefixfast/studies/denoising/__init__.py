"""Pretraining of a small BART by denoising, on a CPU: text infilling and sentence order, as in Lewis et al. (2020)."""
