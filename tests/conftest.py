"""Settings that must be made before jax starts."""

import os

# Pallas' GPU interpreter runs every thread of a thread block as a task of the CPU client's pool,
# and they wait for each other: with as many workers as a small machine has cores, some never start.
os.environ.setdefault("NPROC", "16")
