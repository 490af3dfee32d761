"""The TPU implementation: whom it serves and why, and its kernel in Pallas' interpreter."""

import dataclasses

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_interpreter
from attention_cases import Case
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from tpu_interpreter import as_float64, call, check, run

from paxattn.attention import explain, paged_attention
from paxattn.attention.mosaic_tpu import config

pytestmark = pytest.mark.timeout(240)
BF16 = dict(dtype="bfloat16")


@pytest.fixture(autouse=True)
def _clean():
    with jax.numpy_dtype_promotion("strict"):
        yield
    tpu_interpreter.reset()


# Whom it serves.


def building_for(device_kind):
    device = AbstractDevice(device_kind, None, "tpu")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def on_tpu(
    *, heads=(32, 8), head_dim=128, page_size=16, dtype=jnp.bfloat16, page_dtype=None, tokens=8,
    together=1, **more,
):  # fmt: skip
    """A step for 8 rows, as shapes."""
    shape = jax.ShapeDtypeStruct
    rows = -(-heads[1] // together)
    pages = shape((2, 100, rows, page_size, together * head_dim), page_dtype or dtype)
    if page_dtype is not None:
        scales = shape((2, 100, rows * together, page_size), jnp.bfloat16)
        more |= dict.fromkeys(("k_scales", "v_scales"), scales)
    more |= dict(num_kv_heads=heads[1])
    return dict(
        q=shape((tokens, heads[0], head_dim), dtype), k_pages=pages, v_pages=pages,
        block_tables=shape((8, 40), jnp.int32), kv_lens=shape((8,), jnp.int32),
        cu_q_lens=shape((9,), jnp.int32), layer=shape((), jnp.int32),
    ) | dict(max_q_len=1) | more  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), "tiles of 1 queries"),
        (dict(dtype=jnp.float32, page_size=256, head_dim=256), "tiles of 1 queries"),
        (dict(head_dim=64, together=2, max_q_len=5), "tiles of 5 queries"),
        (dict(head_dim=64, together=2, heads=(9, 3), page_size=128), "tiles of 1 queries"),
        (dict(tokens=200, max_q_len=100), "tiles of 4 queries and of 64"),
        (dict(page_dtype=jnp.int8, head_dim=64, together=2), "tiles of 1 queries"),
        (dict(page_dtype=jnp.float8_e4m3fn, page_size=256, max_q_len=5), "tiles of 5 queries"),
        (dict(page_dtype=jnp.int8, page_size=48), "page_size=48 of int8 pages is not one of"),
        (dict(dtype=jnp.float16), "dtype float16 is not one that TPUs compute with"),
        (dict(head_dim=80), "head_dim=80 is not one of (64, 128, 256)"),
        (dict(page_size=8), "page_size=8 is not a multiple of 16"),
        (dict(head_dim=64), "use a KVCache made for a TPU (init_kv_cache)"),
        (dict(heads=(33, 1)), "33 query heads per KV head (or pair of them) are more than 32"),
        (dict(ancestors=jax.ShapeDtypeStruct((8,), jnp.uint32)), "no ancestor masks"),
        (
            dict(page_size=8192, head_dim=256, dtype=jnp.float32),
            "exceed the vector memory",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU7x"])
def test_the_choice_for_tpus(changes, reason, kind):
    """By the device that code is built for; tracing the whole op needs no TPU either."""
    given = on_tpu(**changes)
    with building_for(kind):
        told = explain(**given)
        assert told.reasons[0][0] == "mosaic_tpu"
        assert reason in told.reasons[0][1]
        assert told.implementation == ("mosaic_tpu" if "tiles" in reason else "reference")
        if "tiles" in reason:
            static = {name: given.pop(name) for name in ("max_q_len", "num_kv_heads")}
            o, lse = jax.eval_shape(
                lambda given: paged_attention(**given, **static, return_lse=True), given
            )
            assert o.shape == given["q"].shape
            assert lse.shape == o.shape[:2]
        else:
            with pytest.raises(NotImplementedError, match=f"cannot serve this on {kind}"):
                paged_attention(**given, implementation="mosaic_tpu")


def test_older_tpus_are_declined():
    with building_for("TPU v3"):
        told = explain(**on_tpu())
    assert told.implementation == "reference"
    assert "for TPUs from v5e and v5p on, not TPU v3" in told.reasons[0][1]


def test_blocks_fit_the_vector_memory():
    for kv_heads in (1, 2, 8, 12, 32):
        for block_q, group in ((1, 1), (1, 16), (4, 4), (256, 1), (16, 16), (48, 5)):
            for head_dim, page_size, page_dtype in (
                (128, 16, None),
                (128, 48, None),
                (256, 256, None),
                (128, 16, "int8"),
                (256, 256, "float8_e4m3fn"),
            ):
                shape = dict(
                    head_dim=head_dim, page_size=page_size, dtype="float32", page_dtype=page_dtype
                )
                made = config.choose(block_q=block_q, group=group, num_kv_heads=kv_heads, **shape)
                rows = config.packed_rows(block_q, group)
                assert rows >= block_q * group
                assert rows % min(rows, config.CHUNK) == 0
                assert kv_heads % made.block_heads == 0
                assert 128 % made.block_pages == 0
                assert config.vmem_bytes(made, rows=rows, **shape) <= 12 * 2**20


@pytest.mark.parametrize("max_q_len", [1, 9, 70])
@pytest.mark.parametrize("window", [None, 40])
def test_tiles_cover_every_token_once_and_read_what_it_sees(max_q_len, window):
    lens = [min(n, max_q_len) for n in (1, 0, 5, 70, 9, 1)]
    case = Case(
        q_lens=tuple(lens), kv_lens=(300, 7, 5, 100, 0, 1), **BF16, head_dim=128, window=window,
        padding=3, max_q_len=max_q_len,
    )  # fmt: skip
    inputs = cases.make(case)
    plan = tpu_interpreter.plan_of(*tpu_interpreter.request_of(inputs))
    assert len(plan.launches) == (2 if max_q_len * 4 > 64 else 1)
    served = sum(np.asarray(tiles.served, int) for tiles in plan.launches)
    want = np.repeat(np.asarray(case.kv_lens) > 0, lens).astype(int)
    np.testing.assert_array_equal(served, [*want, 0, 0, 0])
    for tiles in plan.launches:
        places = np.asarray(tiles.place)[np.asarray(tiles.served)]
        assert len(set(places)) == len(places)
        for token, place in zip(np.flatnonzero(tiles.served), places, strict=True):
            tile, offset = divmod(place, tiles.config.block_q)
            assert tile < tiles.count[0]
            assert offset < tiles.lens[tile]
            assert tiles.tokens[tile] + offset == token
            row = tiles.rows[tile]
            position = case.kv_lens[row] - lens[row] + token - inputs.cu_q_lens[row]
            assert tiles.positions[tile] + offset == position
            assert tiles.starts[tile] <= max(position - (window or 1000) + 1, 0)
            assert tiles.stops[tile] >= min(position + 1, case.kv_lens[row])


# The kernel in the interpreter.


def served(case):
    """The case, changed as little as lets the kernel serve it."""
    return dataclasses.replace(
        case,
        page_size=-(-case.page_size // 16) * 16,
        head_dim=next(size for size in (64, 128, 256) if size >= case.head_dim),
        dtype="bfloat16" if case.dtype == "float16" else case.dtype,
    )


CASES = (
    *dict.fromkeys(
        served(case if case.page_dtype is None else dataclasses.replace(case, page_size=128))
        for case in cases.SMALL
    ),
    # decode, speculation, chunked prefill and idle rows in one batch
    Case(
        q_lens=(1, 20, 0, 3, 1), kv_lens=(130, 90, 9, 70, 0), **BF16, heads=(16, 2), head_dim=128,
        padding=3, layers=2, sinks=True, soft_cap=30.0, window=77,
    ),
    # (scales that several pages share a line of)
    Case(
        q_lens=(1, 3), kv_lens=(90, 40), **BF16, heads=(4, 2), head_dim=128, layers=2,
        page_dtype="int8",
    ),
    # (heads of 64 in pairs, an odd number of them)
    Case(
        q_lens=(1, 20, 2), kv_lens=(130, 90, 70), **BF16, heads=(9, 3), layers=2, sinks=True,
        window=77,
    ),
    Case(
        q_lens=(1, 2), kv_lens=(190, 140), **BF16, heads=(6, 3), layers=2, page_size=64,
        page_dtype="int8",
    ),
    # (the largest groups)
    Case(q_lens=(1, 10), kv_lens=(90, 40), **BF16, heads=(32, 1), head_dim=128),
    Case(q_lens=(1, 3), kv_lens=(90, 40), heads=(32, 2), page_dtype="float8_e4m3fn"),
    # (block tables of several pieces, the window's first page in a later one)
    Case(q_lens=(1, 1), kv_lens=(2200, 2100), **BF16, heads=(2, 1), head_dim=128, window=60),
)  # fmt: skip


GRID = list(dict.fromkeys(map(served, (*cases.full_grid(), *cases.quantized_grid()))))


@pytest.mark.kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle_and_reads_no_poison(case):
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs)))


@pytest.mark.kernels
@pytest.mark.slow
@pytest.mark.timeout(900)  # (a batch of many rows with scales takes minutes of bookkeeping)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_whole_grid(case):
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs)))


@pytest.mark.kernels
def test_traced_window_layer_and_jit():
    case = Case(q_lens=(1, 1), kv_lens=(40, 17), **BF16, layers=2, head_dim=128, window=9)
    inputs = cases.poison(cases.make(case))
    step = jax.jit(lambda window, layer: call(inputs, sliding_window=window, layer=layer))
    for window in (9, 0):
        now = dataclasses.replace(case, window=window or None)
        got = as_float64(inputs, step(jnp.int32(window), jnp.int32(1)))
        check(dataclasses.replace(inputs, case=now), got)


@pytest.mark.kernels
def test_a_row_does_not_depend_on_the_batch():
    case = Case(q_lens=(1, 20, 1), kv_lens=(600, 90, 130), **BF16, heads=(8, 1), head_dim=128)
    inputs = cases.make(case)
    alone = dataclasses.replace(inputs, kv_lens=np.asarray([600, 90, 3], np.int32))
    for got, want in zip(run(alone), run(inputs), strict=True):
        np.testing.assert_array_equal(got[:21], want[:21])


@pytest.mark.kernels
def test_a_missing_page_is_hidden_not_replaced():
    """A sentinel (or any number that is no page) where tokens should be must leak nobody's KV."""
    case = Case(q_lens=(1,) * 4, kv_lens=(80,) * 4, **BF16, heads=(2, 1), head_dim=128)
    inputs = cases.poison(cases.make(case))
    want = cases.oracle(dataclasses.replace(inputs, kv_lens=np.full(4, 64, np.int32)))
    num_pages = len(inputs.owned)
    tables = inputs.block_tables.copy()
    tables[:, 4] = num_pages, -1, num_pages + 7, 2**31 - 1
    o, lse = run(dataclasses.replace(inputs, block_tables=tables))
    np.testing.assert_allclose(o, want[0], atol=1e-2)
    np.testing.assert_allclose(lse, want[1], atol=1e-4)


@pytest.mark.kernels
def test_pages_behind_the_window_may_be_missing():
    case = Case(q_lens=(1, 20), kv_lens=(150, 190), **BF16, heads=(2, 1), head_dim=128, window=40)
    inputs = cases.make(case)
    check(inputs, run(cases.poison(cases.leave_behind(inputs))))


def test_no_gradient():
    inputs = cases.make(Case(q_lens=(1,), kv_lens=(5,), **BF16, head_dim=128))

    def loss(q):
        o, _ = call(dataclasses.replace(inputs, q=q))
        return o.astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="no gradient: use implementation='reference'"):
        jax.grad(loss)(jnp.asarray(inputs.q))
