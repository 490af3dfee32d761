"""The decode grid: microseconds, and the part of the measured read bandwidth, beside the peers.

A call is one of many in one jitted loop or CUDA graph, and successive calls read other pages
(`paxattn.attention.measure`). Each result is checked against float64 for some rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from gpu_sections import jax_peers, torch_peers
from gpu_sections.compare import compare
from gpu_sections.context import Context, workload
from gpu_sections.device import read_bandwidth
from gpu_sections.profile import emit_kernels
from paxattn.attention import measure
from paxattn.attention.measure import Workload


def conversation(count: int) -> list[tuple[int, int]]:
    """Lengths as of the Azure conversation trace of 2023 (median 1,020, mean 1,155)."""
    drawn = np.random.default_rng(0).lognormal(np.log(1020), 0.5, count)
    return [(1, int(n)) for n in np.clip(drawn, 16, 4142)]


BATCHES = {
    "64x4k": [(1, 4096)] * 64,
    "32x1k": [(1, 1024)] * 32,
    "8x32k": [(1, 32768)] * 8,
    "128x4k": [(1, 4096)] * 128,
    "1x128k": [(1, 131072)],
    "1x128k+31x4k": [(1, 131072)] + [(1, 4096)] * 31,
    "8x1k": [(1, 1024)] * 8,
    "16x2k": [(1, 2048)] * 16,
    "64 conversations": conversation(64),
}
HEADS = ((32, 4), (64, 8), (32, 32))
QUANTIZED = {"float8_e4m3fn": ("FlashAttention-3",), "int8": ()}  # (peers that know such pages)
CASES = [
    ("64x4k", 32, 8, 16, None),
    *(("64x4k", 32, 8, 16, dtype) for dtype in QUANTIZED),
    *((name, 32, 8, 16, None) for name in BATCHES if name != "64x4k"),
    *(("64x4k", 32, 8, page, None) for page in (64, 128)),
    *(("64x4k", *heads, 16, None) for heads in HEADS),
    *((name, 32, 8, page, None) for page in (64, 128) for name in ("8x1k", "8x32k")),
    *(("8x1k", *heads, 16, None) for heads in HEADS),
    *(
        (name, 32, 8, page, dtype)
        for name, page in (("64x4k", 128), ("8x1k", 16), ("8x32k", 16))
        for dtype in QUANTIZED
    ),
]


def run(context: Context) -> None:
    read = read_bandwidth(context.tiny)
    peers = jax_peers.DECODE | torch_peers.present(context)

    def figures(work: Workload, seconds: float) -> dict:
        rate = work.num_bytes / seconds / 1e9
        return {"GB/s": rate, "of read bandwidth": rate / read}

    for name, heads, kv_heads, page, page_dtype in CASES[: 4 if context.tiny else None]:
        work = workload(
            BATCHES[name], tiny=context.tiny, num_q_heads=heads, num_kv_heads=kv_heads,
            page_size=page, page_dtype=page_dtype,
        )  # fmt: skip
        pages = -(-max(stored for _, stored in work.rows) // work.page_size)
        make = partial(measure.make_inputs, work, multiple=16 if pages < 128 else 128)
        case = {"case": name, "heads": f"{heads}/{kv_heads}", "page": page}
        case |= {"pages": page_dtype or work.dtype}
        beside = {who: peers[who] for who in QUANTIZED.get(page_dtype, peers) if who in peers}
        compare(context, case, work, make, beside, figures)
        if (name, heads, kv_heads, page, page_dtype) == CASES[0]:
            context.attempt({"profile of": name}, partial(_profile, context, work, make))


def _profile(context: Context, work: Workload, make: Callable[[], measure.Inputs]) -> dict:
    """The kernels of one call."""
    steps = measure.steps_for(work)
    run = measure.compile_loop(measure.op_of(work, context.implementation), make(), steps)
    run()
    return emit_kernels(context, run, steps)
