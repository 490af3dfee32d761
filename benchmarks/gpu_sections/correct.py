"""Every kernel against float64: the shared cases of the tests, with all poisoned that is nobody's.

What is written into pages and copied between them is looked at on the host. Before each case much
of the device's free memory is filled with NaN and given back, so that what a kernel forgets to
write is seen.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpu_sections.context import Context
from paxattn import kv_cache
from paxattn.attention import explain, paged_attention
from paxattn.page_table import PageCopies
from paxattn.quantized import dequantize

sys.path.append(str(Path(__file__).parents[2] / "tests"))
import attention_cases as cases

MORE = (
    cases.Case(q_lens=(1,) * 77, kv_lens=tuple(range(2000, 2077)), head_dim=128, max_q_len=1),
    cases.Case(q_lens=(1,) * 3, kv_lens=(20_000, 5, 4097), heads=(32, 8), head_dim=128),
    cases.Case(q_lens=(129, 129), kv_lens=(4099, 1099), heads=(8, 2), head_dim=128),
    cases.Case(
        q_lens=(17,) * 4 + (1,) * 10, kv_lens=(3000,) * 4 + (256,) * 10, head_dim=128, window=700
    ),
    # (what Hopper's own kernels decline, and the portable ones serve there)
    cases.Case(
        q_lens=(129, 1), kv_lens=(1099, 700), heads=(8, 2), head_dim=256, page_dtype="int8",
        dtype="bfloat16",
    ),
    cases.Case(
        q_lens=(129, 1), kv_lens=(1099, 700), heads=(8, 2), page_size=8, dtype="float16",
        page_dtype="float8_e4m3fn",
    ),
    cases.Case(
        q_lens=(65, 1), kv_lens=(1099, 700), heads=(8, 2), head_dim=192, page_dtype="int8",
        dtype="float16",
    ),
)  # fmt: skip


def run(context: Context) -> None:
    for dtype in ("bfloat16", "int8", "float8_e4m3fn"):
        context.attempt(
            {"case": f"write and copy {dtype}"}, lambda dtype=dtype: _check_pages(dtype)
        )
    for case in (*cases.SMALL, *MORE)[:: 6 if context.tiny else 1]:
        if case.dtype == "float32" and not context.tiny:
            case = dataclasses.replace(case, dtype="bfloat16")
        context.attempt({"case": str(case)}, lambda case=case: _check(context, case))


def _check(context: Context, case: cases.Case) -> dict:
    inputs = cases.poison(cases.make(case))
    arrays = [jnp.asarray(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages)]
    # What the kernel declines is no error: it says so, and the reference serves.
    made = explain(*arrays, implementation=context.implementation, **inputs.options)
    if made.implementation is None:
        return {"declined": made.reasons[0][1]}
    _poison_free_memory(context.tiny)
    o, lse = paged_attention(
        *arrays, implementation=context.implementation, return_lse=True, **inputs.options
    )
    right, right_lse = cases.oracle(inputs)
    error = np.abs(np.asarray(o, np.float64) - right).max()
    seen = np.isfinite(right_lse)
    same = bool((np.isfinite(lse) == seen).all()) and not np.isnan(lse).any()
    lse_error = np.abs(np.asarray(lse, np.float64) - right_lse, where=seen, out=np.zeros(lse.shape))
    good = error <= 2 * cases.TOLERANCE[case.dtype] and same
    limit = 1e-3 if case.page_dtype is None else 4e-3  # (keys may be rounded to the queries' dtype)
    return {
        "right": "yes" if good and lse_error.max() <= limit else "NO",
        "max error": float(error),
        "max error of lse": float(lse_error.max()),
    }


def _check_pages(dtype: str) -> dict:
    """Tokens written to slots anywhere, some of them nowhere, and then a page copied."""
    rng, shape = np.random.default_rng(0), (100, 3, 128)
    sizes = dict(num_layers=2, num_pages=40, page_size=16, num_kv_heads=3, head_dim=128)
    slots = rng.permutation(40 * 16)[: shape[0]].astype(np.int32)
    slots[:5] = 40 * 16 + np.arange(5)
    k, v = rng.standard_normal((2, *shape), dtype=np.float32)
    source, target = slots[5] // 16, slots[6] // 16

    def fill(cache, k, v):
        cache = kv_cache.write(cache, 1, jnp.asarray(slots), k, v)
        src, dst = (jnp.asarray([page], jnp.int32) for page in (source, target))
        return kv_cache.copy_pages(cache, PageCopies(src=src, dst=dst, count=jnp.int32(1)))

    cache = kv_cache.init_kv_cache(**sizes, dtype=dtype)
    cache = jax.jit(fill, donate_argnums=0)(cache, *(jnp.asarray(x) for x in (k, v)))
    worst = 0.0
    for new, pages, scales in (
        (k, cache.k_pages, cache.k_scales), (v, cache.v_pages, cache.v_scales)
    ):  # fmt: skip
        right = np.zeros((2, 40, 16, 3, 128))
        right[1, slots[5:] // 16, slots[5:] % 16] = new[5:]
        right[1, target] = right[1, source]
        right = right.swapaxes(2, 3)
        held = pages if scales is None else dequantize(pages, scales)
        # Half a step of the format: relative, and of the least of a token's numbers.
        most = np.abs(right).max(axis=-1, keepdims=True)
        relative, least = {
            "bfloat16": (2**-8, 0), "int8": (0, 0.5 / 127), "float8_e4m3fn": (2**-4, 2**-10 / 448)
        }[dtype]  # fmt: skip
        step = np.abs(right) * relative + most * least
        error = np.abs(np.asarray(held, np.float64) - right)
        worst = max(worst, float((error / np.maximum(step, 1e-30)).max()))
    return {"right": "yes" if worst <= 1.02 else "NO", "max error in half steps": worst}


def _poison_free_memory(tiny: bool) -> None:
    sizes = [2**n for n in range(10, 16 if tiny else 30)]
    jax.block_until_ready([jnp.full(n // 2, jnp.nan, jnp.bfloat16) for n in sizes])
