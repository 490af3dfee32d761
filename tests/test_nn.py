"""attend, the PagedAttention layer and rotary embedding against plain dense computations."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_steps import plan

from paxattn.kv_cache import init_kv_cache
from paxattn.nn import PagedAttention, attend, rms_norm
from paxattn.page_table import append, init_page_table, reserve
from paxattn.pool import init_pool
from paxattn.ragged import ragged_batch
from paxattn.rope import Rope, rotate
from paxattn.step import ragged_step
from paxattn.tree import Tree

# Row 1 has nothing to do; three tokens of padding.
Q_LENS = (5, 0, 9)
SIZES = dict(page_size=4, num_pages=12)


STEPS = 3


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def batches():
    return plan(np.array(Q_LENS), num_tokens=17, max_q_len=9, steps=STEPS, **SIZES)


def dense_attention(q, k, v, *, window=None, soft_cap=None, sinks=None, sm_scale=None):
    """One sequence in float64: q [S, Hq, D], k and v [S, Hkv, D] -> [S, Hq, D]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k)
    scores *= q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    i, j = np.mgrid[: len(q), : len(k)]
    seen = j <= i if window is None else (j <= i) & (j > i - window)
    weights = np.exp(np.where(seen, scores, -np.inf))
    total = weights.sum(-1)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks, np.float64))[:, None]
    return np.einsum("hij,jhd->ihd", weights / total[..., None], v)


def rows_of(packed):
    """The packed tokens of each row."""
    return np.split(np.asarray(packed)[: sum(Q_LENS)], np.cumsum(Q_LENS)[:-1])


def test_attend_writes_and_reads_through_the_table():
    q, k, v = (normal(seed, (17, heads, 8)) for seed, heads in enumerate((4, 2, 2)))
    batch, _ = batches()
    cache = init_kv_cache(num_layers=2, num_kv_heads=2, head_dim=8, dtype=jnp.float32, **SIZES)
    step = jax.jit(lambda *args: attend(*args, layer=1, sliding_window=6))
    out, cache = step(q, k, v, cache, batch)
    parts = zip(*map(rows_of, (out, q, k, v)), strict=True)
    for found, *qkv in parts:
        np.testing.assert_allclose(found, dense_attention(*qkv, window=6), atol=1e-5)
    np.testing.assert_array_equal(out[sum(Q_LENS) :], 0)
    np.testing.assert_array_equal(cache.k_pages[0], 0)
    written = np.asarray(cache.k_pages[1]).swapaxes(1, 2).reshape(-1, 2, 8)
    np.testing.assert_array_equal(written[batch.slots[:14]], k[:14])
    assert np.count_nonzero(np.abs(written).sum((1, 2))) == 14


def test_a_cache_of_other_sizes_than_the_table_is_refused():
    q, k, v = (normal(seed, (17, heads, 8)) for seed, heads in enumerate((4, 2, 2)))
    batch, _ = batches()
    sizes = dict(num_layers=1, num_kv_heads=2, head_dim=8, num_pages=6, page_size=8)
    cache = init_kv_cache(**sizes)
    message = "the cache has 6 pages of 8 tokens, the page table 12 of 4: make both with the same"
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, cache, batch, layer=0)

    def step():
        rows = dict(max_seqs=1, max_pages_per_seq=2)
        pool = dataclasses.replace(
            init_pool(init_kv_cache(**sizes), **rows), table=init_page_table(**rows, **SIZES)
        )
        return ragged_step(None, pool, jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32))

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step)


@pytest.mark.parametrize("shape", [(18, 16), (17, 8), (1, 17, 16)])
def test_input_of_another_shape_than_the_batch_and_the_layer(shape):
    batch, _ = batches()
    cache = init_kv_cache(num_layers=1, num_kv_heads=2, head_dim=8, **SIZES)
    layer = random_layer(lambda rngs: PagedAttention(16, 2, rngs=rngs))
    with pytest.raises(
        ValueError, match=r"x.shape=.* must be \(17, 16\): the batch's packed tokens"
    ):
        layer(jnp.zeros(shape), cache, batch, 0)


def test_rows_that_are_not_live_store_nothing():
    @jax.jit
    def described():
        table = init_page_table(num_pages=3, page_size=4, max_seqs=2, max_pages_per_seq=2)
        held = jnp.array([2, 3], jnp.int32)
        table, _, _ = reserve(table, held)
        table, _ = append(table, held)
        q_lens, live = jnp.array([2, 1], jnp.int32), jnp.array([False, True])
        batch = ragged_batch(table, q_lens, num_tokens=4, live=live)
        return table, batch, ragged_batch(table, q_lens, num_tokens=4)

    table, batch, everyone = described()
    np.testing.assert_array_equal(batch.kv_lens, [2, 4])
    np.testing.assert_array_equal(batch.slots, [12, 13, 4 * int(table.block_tables[1, 0]) + 3, 15])
    np.testing.assert_array_equal(everyone.kv_lens, [4, 4])
    assert (everyone.slots[:3] < 12).all()


def test_rows_whose_tokens_end_beyond_the_batch_store_nothing():
    class Echo:
        def __call__(self, tokens, batch, cache):
            return batch.slots[:, None], cache

    def step(q_lens):
        cache = init_kv_cache(num_layers=1, num_kv_heads=1, head_dim=2, num_pages=4, page_size=4)
        pool = init_pool(cache, max_seqs=3, max_pages_per_seq=2)
        return ragged_step(Echo(), pool, jnp.zeros(4, jnp.int32), q_lens)

    run = jax.jit(step)
    for lens, fit in (([3, 3, 1], [1, 0, 0]), ([0, 4, 0], [1, 1, 1]), ([2**31 - 1, 2, 1], [0] * 3)):
        q_lens = np.array(lens, np.int32)
        stepped, slots, ok = run(q_lens)
        np.testing.assert_array_equal(ok, np.array(fit, bool))
        stored = q_lens * np.array(fit)
        np.testing.assert_array_equal(stepped.table.kv_lens, stored)
        assert (np.asarray(slots) < 16).sum() == stored.sum()
    with pytest.raises(ValueError, match="max_q_len=4 must be at most 3, the nodes of the tree"):
        ragged_batch(stepped.table, [1, 2, 1], num_tokens=4, tree=Tree(parents=(-1, 0, 0)))


def dense_layer(layer, x, **options):
    """What a PagedAttention computes for one whole sequence x [S, E]."""

    def heads(proj):
        y = x @ np.asarray(proj.kernel[...], np.float64)
        if proj.bias is not None:
            y = y + np.asarray(proj.bias[...])
        return y.reshape(len(x), -1, layer.head_dim)

    q, k, v = heads(layer.q_proj), heads(layer.k_proj), heads(layer.v_proj)
    if layer.q_norm is not None:
        q = np.asarray(rms_norm(jnp.asarray(q), layer.q_norm[...], layer.norm_eps))
        k = np.asarray(rms_norm(jnp.asarray(k), layer.k_norm[...], layer.norm_eps))
    if layer.rope is not None:
        q, k = (np.asarray(layer.rope(jnp.asarray(h), jnp.arange(len(x)))) for h in (q, k))
    out = dense_attention(q, k, v, **options).reshape(len(x), -1)
    out = out @ np.asarray(layer.o_proj.kernel[...], np.float64)
    return out if layer.o_proj.bias is None else out + np.asarray(layer.o_proj.bias[...])


def random_layer(make):
    """A module with random parameters, biases, norms and sinks too, without compiling anything."""
    flat, treedef = jax.tree.flatten(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    rng = np.random.default_rng(7)
    return jax.tree.unflatten(treedef, [normal(rng, leaf.shape) * 0.4 + 0.2 for leaf in flat])


class TwoLayers(nnx.Module):
    """A user's model: two attention layers with a residual stream, full and sliding."""

    def __init__(self, rngs):
        self.first = PagedAttention(16, 4, num_kv_heads=2, qk_norm=True, out_bias=True, rngs=rngs)
        self.second = PagedAttention(
            16,
            2,
            head_dim=6,
            qkv_bias=True,
            rope=None,
            sliding_window=3,
            soft_cap=2.0,
            sinks=True,
            sm_scale=0.7,
            rngs=rngs,
        )

    def __call__(self, x, caches, batch):
        y, first = self.first(x, caches[0], batch, layer=0)
        x = x + y
        y, second = self.second(x, caches[1], batch, 0)
        return x + y, (first, second)


def test_layers_in_a_users_model():
    """Prefill and decode steps of a plain NNX model, against the dense computation."""
    model = random_layer(TwoLayers)
    prefill, decode = batches()
    caches = tuple(
        init_kv_cache(num_layers=1, num_kv_heads=2, head_dim=d, dtype=jnp.float32, **SIZES)
        for d in (4, 6)
    )
    x, new = normal(1, (17, 16)), normal(2, (STEPS, 3, 16))

    @jax.jit
    def run(model, x, new, caches):
        out, caches = model(x, caches, prefill)
        _, outs = jax.lax.scan(
            lambda c, step: model(step[0], c, step[1])[::-1], caches, (new, decode)
        )
        return out, outs

    out, outs = run(model, x, new, caches)
    for row, (inputs, found) in enumerate(zip(rows_of(x), rows_of(out), strict=True)):
        whole = np.concatenate([inputs, new[:, row]])
        hidden = whole + dense_layer(model.first, whole)
        options = dict(window=3, soft_cap=2.0, sm_scale=0.7, sinks=model.second.sinks[...])
        expected = hidden + dense_layer(model.second, hidden, **options)
        np.testing.assert_allclose(
            np.concatenate([found, outs[:, row]]), expected, rtol=0, atol=2e-5
        )


def test_layer_is_differentiable():
    layer = random_layer(lambda rngs: PagedAttention(8, 2, rngs=rngs))
    batch, _ = batches()
    cache = init_kv_cache(num_layers=1, num_kv_heads=2, head_dim=4, dtype=jnp.float32, **SIZES)
    x = normal(1, (17, 8))

    @jax.jit
    @jax.value_and_grad
    def loss(x):
        return jnp.sum(jnp.sin(layer(x, cache, batch, 0)[0]))

    _, grad = loss(x)
    direction = normal(2, x.shape)
    step = 1e-2
    measured = (loss(x + step * direction)[0] - loss(x - step * direction)[0]) / (2 * step)
    np.testing.assert_allclose(np.vdot(grad, direction), measured, rtol=2e-2)


def test_any_function_can_be_the_position_embedding():
    layer = random_layer(
        lambda rngs: PagedAttention(8, 2, rope=lambda x, positions: x * 0, rngs=rngs)
    )
    batch, _ = batches()
    cache = init_kv_cache(num_layers=1, num_kv_heads=2, head_dim=4, dtype=jnp.float32, **SIZES)
    x = normal(1, (17, 8))
    out, _ = jax.jit(layer.__call__)(x, cache, batch, 0)
    values = layer.v_proj(x)[:5]  # all keys alike: the mean of the values
    mean = np.cumsum(values, axis=0) / np.arange(1, 6)[:, None]
    np.testing.assert_allclose(out[:5], layer.o_proj(jnp.asarray(mean)), atol=1e-5)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((0, 2), {}, "hidden_size=0 must be an integer of at least 1"),
        ((8, 2), dict(num_kv_heads=0), "num_kv_heads=0 must be an integer of at least 1"),
        ((8, 4), dict(num_kv_heads=3), "num_heads=4 must be a multiple of num_kv_heads=3"),
        ((9, 2), {}, "hidden_size=9 is no multiple of num_heads=2: pass head_dim"),
        ((8, 2), dict(head_dim=0), "head_dim=0 must be an integer of at least 1"),
        ((8, 2), dict(head_dim=5), "head_dim=5 must be even"),
    ],
)
def test_layer_errors(args, options, message):
    with pytest.raises(ValueError, match=message):
        PagedAttention(*args, **options, rngs=nnx.Rngs(0))


def test_rms_norm():
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    weight = np.linspace(0.5, 2, 8, dtype=np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5), expected, rtol=1e-5)
    half = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16), 1e-5)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, rtol=2e-2)
    assert (rms_norm(jnp.zeros((1, 8)), weight, 1e-6) == 0).all()


def test_rope_rotates_by_relative_position():
    rope = Rope(theta=100.0)
    q, k = normal(0, (2, 1, 8))
    q, k = (np.asarray(rope(np.tile(x, (2000, 1, 1)), np.arange(2000))) for x in (q, k))
    np.testing.assert_allclose(np.linalg.norm(k, axis=-1), np.linalg.norm(k[0]), rtol=1e-5)
    np.testing.assert_array_equal(k[0, 0], normal(0, (2, 1, 8))[1, 0])
    near, far = np.vdot(q[7], k[4]), np.vdot(q[1007], k[1004])
    np.testing.assert_allclose(near, far, rtol=1e-3)


def test_rope_pairs_the_halves():
    quarter = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 1.0]])
    out = rotate(jnp.array([[[1.0, 2.0, 3.0, 4.0]]]), *quarter)
    np.testing.assert_array_equal(out[0, 0], [-3, -4, 1, 2])
    assert rotate(jnp.ones((1, 1, 4), jnp.bfloat16), *quarter).dtype == jnp.bfloat16


def test_rope_scaling():
    plain = Rope(theta=10_000.0).frequencies(64)
    np.testing.assert_allclose(plain, [10_000.0 ** (-i / 32) for i in range(32)], rtol=1e-6)
    assert plain.dtype == np.float32
    linear = Rope(kind="linear", factor=4.0).frequencies(64)
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    rope = Rope(kind="llama3", factor=8.0, original_max_positions=1024)
    for plain_one, found in zip(plain, rope.frequencies(64), strict=True):
        wavelength = 2 * math.pi / plain_one
        if wavelength < 1024 / 4:
            expected = plain_one
        elif wavelength > 1024:
            expected = plain_one / 8
        else:
            smooth = (1024 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * plain_one / 8 + smooth * plain_one
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="ntk"), "kind='ntk' is not known; known: default, linear, llama3, yarn"),
        (dict(theta=0.0), r"theta=0.0 and factor=1.0 must be positive"),
        (dict(factor=float("nan")), "factor=nan must be positive"),
        (
            dict(kind="llama3", low_freq_factor=4.0),
            r"low_freq_factor=4.0 must be positive and below high_freq_factor=4.0",
        ),
        (dict(original_max_positions=0), "original_max_positions=0 must be positive"),
    ],
)
def test_rope_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Rope(**options)


def test_rope_needs_an_even_head():
    with pytest.raises(ValueError, match="head_dim=7 must be even"):
        Rope().frequencies(7)


def test_a_batch_that_does_not_hold_its_rows_is_refused_where_numbers_are_known():
    table = init_page_table(num_pages=8, page_size=4, max_seqs=2, max_pages_per_seq=4)
    for sizes, message in (
        (dict(num_tokens=8, max_q_len=4), "a row of 5 new tokens, more than max_q_len=4"),
        (dict(num_tokens=7), "8 tokens in all, more than num_tokens=7"),
    ):
        with pytest.raises(ValueError, match=message):
            ragged_batch(table, [5, 3], **sizes)
    # Inside jit such a row is as if not live, whether or not all rows could be as long.
    for num_tokens in (8, 11):
        batch = jax.jit(functools.partial(ragged_batch, num_tokens=num_tokens, max_q_len=4))(
            table, jnp.array([3, 5])
        )
        np.testing.assert_array_equal(batch.kv_lens, [3, 0])


def test_attend_takes_floats_for_the_tokens_of_its_batch():
    table = init_page_table(num_pages=8, page_size=4, max_seqs=2, max_pages_per_seq=4)
    batch = ragged_batch(table, [5, 3], num_tokens=8)
    cache = init_kv_cache(
        num_layers=1, num_pages=8, page_size=4, num_kv_heads=1, head_dim=8, dtype="float32"
    )
    q = k = jnp.zeros((8, 1, 8))
    for given, error, message in (
        ((q[:7], k, k), ValueError, "must begin with 8, the batch's tokens"),
        ((q.astype(int), k, k), TypeError, "q has dtype int32, must be floats"),
        ((q, k, k.astype(int)), TypeError, "v has dtype int32, must be floats"),
    ):
        with pytest.raises(error, match=message):
            attend(*given, cache, batch, layer=0)
