"""Prefill through pages: TFLOP/s of whole prompts, and of a chunk at the end of a long context."""

from __future__ import annotations

from functools import partial

from gpu_sections import jax_peers, torch_peers
from gpu_sections.compare import compare
from gpu_sections.context import Context, workload
from paxattn.attention import measure
from paxattn.attention.measure import Workload

CASES = {
    "1x8k": [(8192, 8192)],
    "1x32k": [(32768, 32768)],
    "4x4k": [(4096, 4096)] * 4,
    "1x2k of 32k": [(2048, 32768)],
    "1x4k + 64 decode of 4k": [(4096, 4096)] + [(1, 4096)] * 64,
}
# (dtype of pages, head_dim, page size): on Hopper its own kernel serves the first alone.
QUANTIZED = (("float8_e4m3fn", 128, 16), ("float8_e4m3fn", 256, 16), ("int8", 64, 8))


def run(context: Context) -> None:
    peers = jax_peers.PREFILL | torch_peers.present(context)
    for name, rows in CASES.items():
        work = workload(rows, tiny=context.tiny)
        case = {"case": name, "page": work.page_size}
        compare(context, case, work, partial(measure.make_inputs, work), peers, figures)
    for page_dtype, head_dim, page in QUANTIZED[: 1 if context.tiny else None]:
        sizes = dict(head_dim=head_dim, page_size=page, page_dtype=page_dtype)
        work = workload(CASES["1x8k"], tiny=context.tiny, **sizes)
        case = {"case": "1x8k", "page": page, "head_dim": head_dim, "pages": page_dtype}
        compare(context, case, work, partial(measure.make_inputs, work), {}, figures)


def figures(work: Workload, seconds: float) -> dict:
    return {"TFLOP/s": work.num_flops / seconds / 1e12}
