"""Paged attention kernels for NVIDIA GPUs, in Pallas on Mosaic GPU."""
