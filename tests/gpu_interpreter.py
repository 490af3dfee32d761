"""Runs the GPU kernels in Pallas' interpreter: numbers, barriers, races, poisoned memory.

What the interpreter cannot see (layouts, registers, shared memory) the compile tests look at. The
memory that a kernel does not write is NaN here.
"""

import dataclasses
import importlib.util

import attention_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest

from paxattn.attention import checks
from paxattn.attention.mosaic_gpu import plan, support
from paxattn.attention.mosaic_gpu.config import (
    HEAD_DIMS,
    QUANTIZED_HEAD_DIMS,
    Config,
    short_q_len,
)
from paxattn.attention.mosaic_gpu.config import max_rows as most_rows
from paxattn.attention.mosaic_gpu.portable.config import max_rows
from paxattn.attention.mosaic_gpu.prefill_config import default_config

THERE = bool(importlib.util.find_spec("jax._src.pallas.mosaic_gpu.interpret.race_detection_state"))
MARKS = [
    pytest.mark.kernels,
    pytest.mark.skipif(not THERE, reason="Pallas' GPU interpreter needs jax 0.11"),
]


def interpreted(test):
    for mark in MARKS:
        test = mark(test)
    return test


def reset():
    """After each test: an error leaves the interpreter unusable."""
    if THERE:
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        gpu_callbacks.reset_gpu_interpret_mode_state()


def no_races():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return not gpu_callbacks.get_races().races_found


def call(
    inputs, *, cores=3, stages=2, block_kv=64, ctas=2, split=None, short=None, decode=True,
    prefill=None, card=None, long_card=None, split_over=None, **changes,
):  # fmt: skip
    """`(o, lse)` of the implementation; rows are routed as they would be, unless told otherwise.

    `short` bounds the new tokens of rows for the decode kernel (0: none); with `decode=False` it
    does not run, and nobody serves them. `prefill` is the other kernel's config, if not the
    heuristic's. With a `card` the portable kernels run, in the same block sizes; with a `long_card`
    the portable prefill kernel beside Hopper's own decode kernel.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    case, options = inputs.case, inputs.options | changes
    for name in ("layer", "sliding_window"):
        if isinstance(options[name], int):
            options[name] = np.int32(options[name])
    if options["max_q_len"] is None:
        options["max_q_len"] = max(*case.q_lens, 1)
    arrays = [jnp.asarray(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages)]
    request = checks.check(*arrays, **options)
    if short is None:
        short = longest_short(case, request.max_q_len, card)
    sizes = Config(block_kv=block_kv, stages=stages, num_cores=cores, split=split)
    long_card = long_card or card
    wide = long_card is None and case.page_dtype is not None
    prefill = prefill or default_config(head_dim=case.head_dim, num_sms=ctas, quantized=wide)
    made = plan.plan_batch(
        **{k: options[k] for k in ("block_tables", "kv_lens", "cu_q_lens", "sliding_window")},
        request=request,
        short_q_len=short,
        decode=sizes if short and decode else None,
        prefill=prefill if short < request.max_q_len else None,
        decode_card=card,
        prefill_card=long_card,
        split_over=split_over,
    )
    return support.run(
        *arrays,
        **options,
        plan=made,
        sm_scale=np.float32(case.head_dim**-0.5),
        interpret=plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan"),
    )


def longest_short(case, max_q_len, card=None):
    """New tokens that a row may have for the decode kernel."""
    most = most_rows(case.head_dim, quantized=case.page_dtype is not None)
    most = most if card is None else max_rows(case.head_dim)
    return short_q_len(max_q_len, case.heads[0] // case.heads[1], case.head_dim, most)


def long_tokens(case):
    """bool[T], which tokens the prefill kernel for Hopper serves in a mixed batch."""
    short = longest_short(case, max(*case.q_lens, 1))
    return np.repeat([*(n > short for n in case.q_lens), False], [*case.q_lens, case.padding])


def grid(page_sizes=support.PAGE_SIZES):
    """What of the full grid the kernels serve, 16-bit and of short rows (0.1 s per block)."""
    served = {}
    for case in (*cases.full_grid(), *cases.quantized_grid()):
        head_dims = HEAD_DIMS if case.page_dtype is None else QUANTIZED_HEAD_DIMS
        if case.head_dim in head_dims and case.page_size in page_sizes:
            few = [i for i, n in enumerate(case.kv_lens) if n <= 1100][:5]
            case = dataclasses.replace(
                case,
                dtype="bfloat16" if case.dtype == "float32" else case.dtype,
                q_lens=tuple(case.q_lens[i] for i in few),
                kv_lens=tuple(case.kv_lens[i] for i in few),
            )
            served[case] = None
    return list(served)


def as_float64(inputs, got):
    """The results in float64; fails if a dtype is wrong, or if there was a race."""
    o, lse = got
    assert o.dtype == inputs.q.dtype
    assert lse.dtype == jnp.float32
    out = np.asarray(o, np.float64), np.asarray(lse, np.float64)
    assert no_races()
    return out


def run(inputs, **options):
    return as_float64(inputs, call(inputs, **options))


def check(inputs, got, served=None, widened=False):
    """Compares with the oracle; of tokens that are not `served` (bool[T]), with nothing.

    Queries that are `widened` (bool[T]) read quantised pages rounded to their dtype.
    """
    (o, lse), (want_o, want_lse) = got, cases.oracle(inputs)
    for want, other in zip((want_o, want_lse), cases.oracle(cases.rounded(inputs)), strict=True):
        want[:] = np.where(np.reshape(widened, (-1,) + (1,) * (want.ndim - 1)), other, want)
    if served is not None:
        want_o[~served], want_lse[~served] = 0.0, -np.inf
    # (Quantised numbers, and with them the queries, become what the hardware converts them to.)
    wide = "bfloat16" if inputs.case.page_dtype == "int8" else inputs.case.dtype
    tolerance = max(cases.TOLERANCE[dtype] for dtype in (wide, inputs.case.dtype))
    np.testing.assert_allclose(o, want_o, atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    np.testing.assert_allclose(lse, want_lse, atol=cases.LSE_TOLERANCE, rtol=cases.LSE_TOLERANCE)
    np.testing.assert_array_equal(o[np.isneginf(want_lse)], 0.0)  # exactly
