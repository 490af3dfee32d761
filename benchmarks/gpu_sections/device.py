"""The device, versions, and the bandwidth that plain reads and copies reach."""

from __future__ import annotations

import subprocess
import time
from importlib import metadata

import jax
import jax.numpy as jnp
from _common import machine
from jax import lax

from gpu_sections.context import Context


def run(context: Context) -> None:
    for what, value in machine().items():
        context.emit({"what": what, "value": str(value)})
    for name in ("jaxlib", "jax-cuda13-plugin", "torch", "triton", "transformers", "flashinfer"):
        context.emit({"what": name, "value": _version(name)})
    context.attempt({"what": "nvidia-smi"}, lambda: {"value": _smi()})
    context.attempt({"bandwidth": "read"}, lambda: {"GB/s": read_bandwidth(context.tiny)})
    context.attempt({"bandwidth": "copy"}, lambda: {"GB/s": _bandwidth(context.tiny, copy=True)})


def read_bandwidth(tiny: bool) -> float:
    """GB/s of summing an array far larger than any cache."""
    return _bandwidth(tiny, copy=False)


def _bandwidth(tiny: bool, *, copy: bool) -> float:
    steps = 16
    x = jnp.ones(2**18 if tiny else 2**30, jnp.bfloat16)

    @jax.jit
    def read(x, zero):
        def body(_, total):
            return jnp.sum(x * (1 + zero * total).astype(x.dtype), dtype=jnp.float32)

        return lax.fori_loop(0, steps, body, jnp.float32(0))

    @jax.jit
    def move(x, zero):
        return lax.fori_loop(0, steps, lambda i, y: y + (zero + i).astype(y.dtype), x)

    loop, times = (move if copy else read), []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(loop(x, jnp.float32(0)))
        times.append(time.perf_counter() - start)
    # The first call compiles.
    return (2 if copy else 1) * x.nbytes * steps / sorted(times[1:])[2] / 1e9


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not there"


def _smi() -> str:
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
