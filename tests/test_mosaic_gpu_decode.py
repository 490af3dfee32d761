"""The decode kernel for GPUs in Pallas' interpreter."""

import dataclasses

import attention_cases as cases
import gpu_interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case
from gpu_interpreter import as_float64, call, check, run

from paxattn.attention.mosaic_gpu import config, support

pytestmark = [*gpu_interpreter.MARKS, pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def _clean():
    with jax.numpy_dtype_promotion("strict"):
        yield
    gpu_interpreter.reset()


BF16 = dict(dtype="bfloat16")
EDGES = dict(q_lens=(1, 0, 1, 1, 1, 0), kv_lens=(1, 0, 15, 16, 17, 40), max_q_len=1)

CASES = (
    Case(**EDGES, **BF16, padding=2, layers=2, window=64),
    # (a unit in many pieces, soft cap, sinks, a window that begins inside a page)
    Case(
        q_lens=(1, 1), kv_lens=(523, 37), dtype="float16", max_q_len=1, heads=(4, 1),
        soft_cap=50.0, sinks=True, window=330, page_size=8,
    ),
    Case(q_lens=(1, 1), kv_lens=(128, 129), **BF16, head_dim=128, page_size=128, heads=(2, 2)),
    Case(q_lens=(1,), kv_lens=(100,), **BF16, head_dim=256, page_size=32, heads=(16, 1)),
    Case(q_lens=(1,), kv_lens=(70,), dtype="float16", head_dim=80, heads=(5, 1)),
    # speculation: a few new tokens per row, rows that see nothing
    Case(
        q_lens=(5, 1, 0, 3), kv_lens=(18, 130, 0, 64), **BF16, heads=(4, 2), sinks=True,
        soft_cap=30.0, window=9,
    ),
    Case(q_lens=(9, 1, 1), kv_lens=(5, 0, 70), **BF16, heads=(4, 2), padding=3),
    Case(q_lens=(4, 4), kv_lens=(30, 5), **BF16, causal=False, page_size=64, heads=(5, 1)),
    # quantised pages
    Case(**EDGES, **BF16, page_dtype="float8_e4m3fn", padding=2, layers=2, window=64),
    Case(
        q_lens=(1, 1), kv_lens=(323, 37), **BF16, page_dtype="int8", max_q_len=1, heads=(4, 1),
        soft_cap=50.0, sinks=True, window=230, page_size=8, head_dim=128,
    ),
    Case(
        q_lens=(5, 1, 0), kv_lens=(18, 130, 0), dtype="float16", page_dtype="float8_e4m3fn",
        heads=(4, 2), page_size=128,
    ),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle_and_reads_no_poison(case):
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs)))


def grid():
    """What of the full grid this kernel serves, as decode steps and as short speculation."""
    seen = set()
    for case in cases.full_grid():
        rows = max(case.q_lens) * (case.heads[0] // case.heads[1])
        if case.dtype == "float32":
            case = dataclasses.replace(case, dtype="bfloat16")
        served = case.head_dim in config.HEAD_DIMS and case.page_size in support.PAGE_SIZES
        if served and rows <= config.max_rows(case.head_dim) and case not in seen:
            seen.add(case)
            few = [i for i, n in enumerate(case.kv_lens) if n <= 700][:6]  # (0.1 s per block)
            if few:
                yield dataclasses.replace(
                    case,
                    q_lens=tuple(case.q_lens[i] for i in few),
                    kv_lens=tuple(case.kv_lens[i] for i in few),
                )


@pytest.mark.slow
@pytest.mark.parametrize("case", list(dict.fromkeys(grid())), ids=str)
def test_whole_grid(case):
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs)))


def test_traced_window_layer_and_jit():
    inputs = cases.poison(cases.make(Case(**EDGES, **BF16, layers=2, heads=(2, 1), window=9)))
    step = jax.jit(lambda window, layer: call(inputs, sliding_window=window, layer=layer))
    for window in (9, 0):
        case = dataclasses.replace(inputs.case, window=window or None)
        o, lse = step(jnp.int32(window), jnp.int32(1))
        check(dataclasses.replace(inputs, case=case), as_float64(inputs, (o, lse)))


def test_fixed_split_does_not_depend_on_the_batch():
    case = Case(q_lens=(1, 1), kv_lens=(300, 70), **BF16, heads=(2, 1), max_q_len=1)
    inputs = cases.make(case)
    fixed = run(inputs, split=128)
    check(inputs, fixed)
    other = dataclasses.replace(inputs, kv_lens=np.asarray([300, 3], np.int32))
    for got, want in zip(run(other, split=128, cores=2), fixed, strict=True):
        np.testing.assert_array_equal(got[0], want[0])


def test_a_missing_page_is_hidden_not_replaced():
    """A sentinel (or any number that is no page) where tokens should be must leak nobody's KV."""
    case = Case(q_lens=(1,) * 4, kv_lens=(80,) * 4, **BF16, heads=(2, 1), max_q_len=1)
    inputs = cases.poison(cases.make(case))
    want = cases.oracle(dataclasses.replace(inputs, kv_lens=np.full(4, 64, np.int32)))
    num_pages = len(inputs.owned)
    tables = inputs.block_tables.copy()
    tables[:, 4] = num_pages, -1, num_pages + 7, 2**31 - 1
    o, lse = run(dataclasses.replace(inputs, block_tables=tables))
    np.testing.assert_allclose(o, want[0], atol=1e-2)
    np.testing.assert_allclose(lse, want[1], atol=1e-4)


def test_pages_behind_the_window_may_be_missing():
    case = Case(q_lens=(1, 1, 2), kv_lens=(300, 90, 150), **BF16, heads=(2, 1), window=40)
    inputs = cases.make(case)
    check(inputs, run(cases.poison(cases.leave_behind(inputs))))


def test_many_pages():
    case = Case(q_lens=(1, 1), kv_lens=(90, 17), **BF16, heads=(1, 1), page_size=8, max_q_len=1)
    inputs = cases.make(case)
    far = cases.scatter(inputs)
    check(far, run(far))


def test_no_gradient():
    inputs = cases.make(Case(q_lens=(1,), kv_lens=(5,), **BF16, max_q_len=1))

    def loss(q):
        o, _ = call(dataclasses.replace(inputs, q=q))
        return o.astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="no gradient: use implementation='reference'"):
        jax.grad(loss)(jnp.asarray(inputs.q))
