"""Quantised pages: numbers and scales, through every step that moves them, and what they hold."""

import dataclasses

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxattn import kv_cache, memory, page_table, paged_attention, quantized
from paxattn.attention import checks, choice
from paxattn.kv_cache import init_kv_cache
from paxattn.page_table import PageCopies
from paxattn.target import Target

L, N, H, P, D = 2, 6, 3, 4, 8
BOTH = pytest.mark.parametrize("dtype", list(cases.QUANTIZED))
# (What moves pages does not know what they hold; a CPU takes long over fp8.)
INT8_FIRST = pytest.mark.parametrize(
    "dtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)]
)
# What a number may be off by, in units of its token's largest: half a step of the format there.
STEP = {"float8_e4m3fn": 16 / 448, "int8": 0.5 / 127}


def empty(dtype, **sizes):
    shape = dict(num_layers=L, num_pages=N, page_size=P, num_kv_heads=H, head_dim=D) | sizes
    return init_kv_cache(**shape, dtype=dtype)


def draw(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)) * 3.0),
                       jnp.float32)  # fmt: skip


def holds(cache):
    """What the pages stand for, f32[2, L, N, H, P, D]."""
    k = quantized.dequantize(cache.k_pages, cache.k_scales)
    return np.stack([k, quantized.dequantize(cache.v_pages, cache.v_scales)])


# Numbers.


@BOTH
def test_quantize(dtype):
    """As NumPy does it, with the scale as it is stored, inside `jit` too; within half a step."""
    x = draw(50, H, D)
    numbers, scales = jax.jit(quantized.quantize, static_argnums=1)(x, dtype)
    assert (numbers.dtype.name, scales.dtype) == (dtype, jnp.bfloat16)
    want, want_scales = cases.quantize(np.asarray(x), dtype)
    np.testing.assert_array_equal(np.asarray(scales), want_scales)
    same = np.asarray(numbers, np.float32) == want.astype(np.float32)
    assert same.mean() > 0.99  # (XLA may divide by multiplying, and rounds to fp8 by way of f16)
    error = np.abs(quantized.dequantize(numbers, scales) - x)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    assert (error <= 1.01 * STEP[dtype] * largest).all()
    assert error.max() > 0


@BOTH
def test_numbers_that_are_not_finite_stay_in_their_token_and_head(dtype):
    x = np.ones((5, 2, D), np.float32)
    x[1, 0, 3], x[2, 1, 0], x[3] = np.nan, -np.inf, 0.0
    x[4] = 1e-42  # no normal number
    got = np.asarray(quantized.dequantize(*quantized.quantize(jnp.asarray(x), dtype)))
    want = np.where(np.isfinite(x).all(axis=-1, keepdims=True), x, np.nan)
    want[4] = 0.0
    np.testing.assert_allclose(got, want, rtol=2**-8)


@pytest.mark.parametrize(("dtype", "name"), [("fp8", "float8_e4m3fn"), (jnp.int8, "int8")])
def test_names_of_dtypes(dtype, name):
    assert quantized.page_dtype(dtype).name == name
    assert empty(dtype).k_pages.dtype.name == name


# The cache, step by step.


@INT8_FIRST
def test_a_page_stays_right_however_its_tokens_came(dtype):
    """Appended one by one, forked, copied on write, moved, cut and written over: every token is
    what it would be if it had been quantised alone."""
    table = page_table.init_page_table(num_pages=N, page_size=P, max_seqs=2, max_pages_per_seq=3)
    cache, tokens = empty(dtype, num_layers=1), draw(20, H, D)
    alone = np.asarray(quantized.dequantize(*quantized.quantize(tokens, dtype)))

    @jax.jit
    def add(table, cache, row, token):
        """One more token to a row."""
        lens = (jnp.arange(2) == row).astype(jnp.int32)
        table, ok, copies = page_table.reserve(table, lens)
        cache = kv_cache.copy_pages(cache, copies)
        slots = page_table.slot_mapping(table, lens, 1)
        new = tokens[token][None]
        cache = kv_cache.write(cache, 0, slots, new, -new)
        table, _ = page_table.append(table, lens)
        return table, cache, ok.all(), copies.count

    def read(row):
        pages = holds(cache)[:, 0, np.asarray(table.block_tables[row]).clip(0, N - 1)]
        flat = np.moveaxis(pages, 3, 2).reshape(2, -1, H, D)[:, : int(table.kv_lens[row])]
        np.testing.assert_array_equal(flat[1], -flat[0])
        return flat[0]

    rows = [[], []]
    copied = 0
    for token in range(6):
        table, cache, ok, _ = add(table, cache, 0, token)
        assert ok
        rows[0].append(token)
    table, _ = page_table.fork(table, jnp.array([0, 0]), jnp.array([0, 1]))
    rows[1] = list(rows[0])
    for token in range(6, 9):
        for row in (1, 0):
            table, cache, ok, count = add(table, cache, row, token + 4 * row)
            assert ok
            copied += int(count)
            rows[row].append(token + 4 * row)
    assert copied == 1
    table, _ = page_table.truncate(table, jnp.array([5, 7]))
    rows = [rows[0][:5], rows[1][:7]]
    table, cache, *_ = add(table, cache, 0, 15)  # over what was cut
    rows[0].append(15)
    for row in (0, 1):
        np.testing.assert_array_equal(read(row), alone[rows[row]])
    slot = lambda row, i: int(table.block_tables[row, i // P]) * P + i % P  # noqa: E731
    cache = kv_cache.move_slots(cache, jnp.array([slot(0, 1)]), jnp.array([slot(0, 5)]))
    np.testing.assert_array_equal(read(0), alone[[*rows[0][:5], rows[0][1]]])
    page_table.check_invariants(table)


@INT8_FIRST
def test_steps_move_scales_with_pages(dtype):
    full = empty(dtype)
    slots = jnp.arange(N * P, dtype=jnp.int32)
    new = draw(N * P, H, D)
    for layer in range(L):
        full = kv_cache.write(full, layer, slots, new, new[::-1])
    before = holds(full)
    copies = PageCopies(src=jnp.array([4, 2]), dst=jnp.array([0, 3]), count=jnp.int32(1))
    want = before.copy()
    want[:, :, 0] = want[:, :, 4]
    np.testing.assert_array_equal(holds(kv_cache.copy_pages(full, copies)), want)
    scrubbed = kv_cache.scrub(full, jnp.array([1, 5]), 0, 2)
    for leaf in jax.tree.leaves(scrubbed):
        assert not np.asarray(leaf[:, [1, 5]]).astype(np.float32).any()
    want = before.copy()
    want[:, :, [1, 5]] = 0
    np.testing.assert_array_equal(holds(scrubbed), want)


def test_bytes():
    """Counted as they lie there: 1.9 times the tokens of bf16 in the same bytes, and more."""
    sizes = dict(num_layers=3, num_kv_heads=2, head_dim=64)
    for dtype in quantized.PAGE_DTYPES:
        cache = empty(dtype, num_pages=5, page_size=16, **sizes)
        real = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        assert real == cache.bytes_per_page * 5 == cache.bytes_per_token * 5 * 16
        assert cache.bytes_per_token == memory.bytes_per_token(**sizes, dtype=dtype)
    room = sum(leaf.nbytes for leaf in jax.tree.leaves(empty("bfloat16", num_pages=100, **sizes)))
    for dtype in cases.QUANTIZED:
        budget = dict(memory_bytes=room, max_len=16, mean_len=16, page_size=P, **sizes)
        more = memory.plan(**budget, dtype=dtype)
        cache = empty(dtype, num_pages=more.num_pages, **sizes)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == more.cache_bytes <= room
        # (the plan's own table takes some of the room)
        assert cache.num_pages >= 1.9 * memory.plan(**budget).num_pages >= 1.9 * 98
        assert room // cache.bytes_per_token >= 1.9 * 100 * P


# Attention.


def request(**changes):
    case = cases.Case(q_lens=(1, 1), kv_lens=(9, 5), page_size=4, page_dtype="int8", max_q_len=1)
    inputs = cases.make(dataclasses.replace(case, **changes))
    arrays = dict(q=inputs.q, k_pages=inputs.k_pages, v_pages=inputs.v_pages)
    return {name: jnp.asarray(x) for name, x in arrays.items()} | inputs.options


FLOAT = cases.make(cases.Case(q_lens=(1, 1), kv_lens=(9, 5), page_size=4)).k_pages


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "its numbers mean nothing without k_scales=", dict(k_scales=None)),
        (TypeError, "its numbers mean nothing without v_scales=", dict(v_scales=None)),
        (ValueError, r"k_scales has shape \(9, 2\), must be \(10, 2, 4\)",
         dict(k_scales=np.zeros((9, 2), np.float32))),
        (TypeError, "v_scales has dtype float32, must be bfloat16",
         dict(v_scales=np.zeros((10, 2, 4), np.float32))),
        (TypeError, "v_pages has dtype float32, k_pages has int8", dict(v_pages=FLOAT)),
        (TypeError, "k_scales= goes with quantised pages, k_pages has dtype float32",
         dict(k_pages=FLOAT, v_pages=FLOAT)),
    ],
)  # fmt: skip
def test_what_does_not_go_together(error, message, changes):
    with pytest.raises(error, match=message):
        paged_attention(**(request() | changes))


@pytest.mark.parametrize(
    ("platform", "kind", "sizes", "reason"),
    [
        ("gpu", "NVIDIA H200", dict(head_dim=80, page_size=16), "quantised pages"),
        ("tpu", "TPU v5 lite", dict(head_dim=128, page_size=48), "page_size=48 of int8 pages"),
    ],
)
def test_kernels_that_cannot_say_so(platform, kind, sizes, reason):
    long = dict(q_lens=(1, 70), kv_lens=(9, 70), max_q_len=None)
    asked = checks.check(**request(dtype="bfloat16", **sizes, **long))
    name = f"mosaic_{platform}"
    made = choice.consider(asked, Target(platform=platform, device_kind=kind), (name, "reference"))
    assert made.implementation == "reference"
    assert reason in dict(made.reasons)[name]


@INT8_FIRST
def test_gradients_end_at_quantised_pages(dtype):
    """They have none themselves, and say so; queries have theirs."""
    case = cases.Case(
        q_lens=(1, 2), kv_lens=(9, 21), page_size=4, page_dtype=dtype, heads=(4, 2), head_dim=16
    )
    inputs = cases.make(case)
    q, k, v = (jnp.asarray(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages))
    scales = {name: jnp.asarray(inputs.options[name]) for name in ("k_scales", "v_scales")}
    rest = {name: x for name, x in inputs.options.items() if name not in scales}

    def loss(q, k_scales):
        own = scales | {"k_scales": k_scales}
        return jnp.sum(paged_attention(q, k, v, **own, **rest) ** 2)

    found = np.asarray(jax.grad(loss)(q, scales["k_scales"]))
    direction = np.random.default_rng(1).normal(size=q.shape)
    moved = (dataclasses.replace(inputs, q=inputs.q + e * direction) for e in (1e-4, -1e-4))
    up, down = ((cases.oracle(one)[0] ** 2).sum() for one in moved)
    np.testing.assert_allclose((found * direction).sum(), (up - down) / 2e-4, rtol=1e-3)
    with pytest.raises(NotImplementedError, match="quantised pages have no gradient"):
        jax.grad(loss, argnums=1)(q, scales["k_scales"])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_needle_is_found_among_many(dtype):
    """One key fits the query, 128k are noise: its value comes out, whatever is summed."""
    rng = np.random.default_rng(7)
    length, page_size, dim = 131_072, 16, 64
    needle = length // 3
    page, place = divmod(needle, page_size)
    q, wanted = rng.normal(size=(2, dim)).astype(np.float32)
    exact = rng.normal(size=(2, length // page_size, 1, page_size, dim)).astype(np.float32)
    exact[:, page, 0, place] = 3.0 * q, wanted
    order = rng.permutation(len(exact[0]))
    numbers, scales = zip(*(cases.quantize(x[order], dtype) for x in exact), strict=True)
    o = paged_attention(
        jnp.asarray(q)[None, None], *map(jnp.asarray, numbers),
        k_scales=jnp.asarray(scales[0]), v_scales=jnp.asarray(scales[1]),
        block_tables=np.argsort(order).astype(np.int32)[None],
        kv_lens=np.array([length], np.int32), cu_q_lens=np.array([0, 1], np.int32), max_q_len=1,
    )  # fmt: skip
    o = np.asarray(o)[0, 0]
    assert np.abs(o - wanted).max() <= STEP[dtype] * np.abs(wanted).max() + 1e-3
    k, v = (
        (x.astype(np.float64) * s.astype(np.float64)[..., None]).reshape(length, dim)
        for x, s in zip(numbers, scales, strict=True)
    )
    scores = k @ q.astype(np.float64) * dim**-0.5
    p = np.exp(scores - scores.max())
    np.testing.assert_allclose(o, p @ v / p.sum(), atol=1e-5)
