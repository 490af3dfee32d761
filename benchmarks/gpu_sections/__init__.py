"""The sections of `benchmarks/gpu.py`: a module each, with a function `run(context)`."""
