"""The kernels for NVIDIA GPUs other than Hopper: Ampere, Ada and Blackwell. `fold` says how."""
