"""The time of every kernel on the device, from JAX's profiler."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gpu_sections.context import Context


def emit_kernels(context: Context, run: Callable[[], Any], steps: int) -> dict:
    """Emits the kernels of a run of `steps` steps by their time, the longest first.

    Returns:
        The sums, for a row.
    """
    times = kernel_times(run)
    total = sum(times.values())
    for name, seconds in sorted(times.items(), key=lambda item: -item[1])[:20]:
        context.emit(
            {"kernel": name[:80], "us a step": seconds / steps * 1e6, "%": 100 * seconds / total}
        )
    return {"kernels": len(times), "us a step": total / steps * 1e6}


def kernel_times(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds by kernel of one run (which should have been compiled before).

    Empty where the profiler sees no device, as on a CPU.
    """
    times: dict[str, float] = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):  # (others repeat the same by module and op)
                    for event in line.events:
                        times[event.name] += event.duration_ns * 1e-9
    return dict(times)
