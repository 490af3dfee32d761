"""Runs the TPU kernel in Pallas' interpreter: numbers, copies, semaphores, races, poisoned memory.

What the interpreter cannot see (tiles, the size of memories) the compile tests look at. Memory that
a kernel has not written is NaN here, and a copy happens only when it is waited for.
"""

from functools import partial

import attention_cases as cases
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from paxattn.attention import checks
from paxattn.attention.mosaic_tpu import support
from paxattn.attention.pairs import attend_pairs
from paxattn.kv_cache import PAIRED_HEAD_DIM
from paxattn.target import Target

V5E = Target(platform="tpu", device_kind="TPU v5 lite")


def reset():
    """After each test: an error leaves the interpreter unusable."""
    pltpu.reset_tpu_interpret_mode_state()


def request_of(inputs, **changes):
    """What is asked of the kernel, and the options, typed as the public op leaves them."""
    options = inputs.options | changes
    for name in ("layer", "sliding_window"):
        if isinstance(options[name], int):
            options[name] = np.int32(options[name])
    if options["max_q_len"] is None:
        options["max_q_len"] = max(*inputs.case.q_lens, 1)
    return checks.check(inputs.q, inputs.k_pages, inputs.v_pages, **options), options


def plan_of(request, options):
    batch = ("block_tables", "kv_lens", "cu_q_lens", "sliding_window")
    support.check(request, V5E)
    return support.schedule(request, V5E, **{k: options[k] for k in batch}, fixed_split=None)


def call(inputs, **changes):
    """`(o, lse)` of the implementation, of heads of 64 in pairs."""
    if inputs.case.head_dim == PAIRED_HEAD_DIM:
        inputs = cases.paired(inputs)
    request, options = request_of(inputs, **changes)
    run = partial(
        support.run,
        plan=plan_of(request, options),
        sm_scale=np.float32(inputs.case.head_dim**-0.5),
        interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"),
    )
    if request.paired:
        run = partial(attend_pairs, run)
    return run(*(jnp.asarray(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages)), **options)


def as_float64(inputs, got):
    """The results in float64; fails if a dtype is wrong, or if there was a race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    o, lse = got
    assert o.dtype == inputs.q.dtype
    assert lse.dtype == jnp.float32
    out = np.asarray(o, np.float64), np.asarray(lse, np.float64)
    assert not interpret_pallas_call.races.races_found
    return out


def run(inputs, **changes):
    return as_float64(inputs, call(inputs, **changes))


def check(inputs, got):
    """Compares with the oracle."""
    (o, lse), (want_o, want_lse) = got, cases.oracle(inputs)
    tolerance = cases.TOLERANCE[inputs.case.dtype]
    np.testing.assert_allclose(o, want_o, atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    np.testing.assert_allclose(lse, want_lse, atol=cases.LSE_TOLERANCE, rtol=cases.LSE_TOLERANCE)
    np.testing.assert_array_equal(o[np.isneginf(want_lse)], 0.0)  # exactly
