"""Every kernel against float64: the shared cases of the tests, with all poisoned that is nobody's.

Before each case much of the device's free memory is filled with NaN and given back, so that what a
kernel forgets to write is seen.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpu_sections.context import Context
from paxattn.attention import explain, paged_attention

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


def _poison_free_memory(tiny: bool) -> None:
    sizes = [2**n for n in range(10, 16 if tiny else 30)]
    jax.block_until_ready([jnp.full(n // 2, jnp.nan, jnp.bfloat16) for n in sizes])
