"""Heads of 64 side by side in pairs, as a cache has them on a TPU: the same results as without."""

import dataclasses

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case
from flax import nnx
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)
from tiny import tiny_config

from paxattn import generate, kv_cache, memory
from paxattn.attention import attention_schedule, explain, measure, paged_attention
from paxattn.kv_cache import init_kv_cache
from paxattn.models import Decoder
from paxattn.page_table import PageCopies
from paxattn.serving import Engine, SnapshotError, init_serve, placing

SIZES = dict(num_layers=2, num_pages=6, page_size=4, head_dim=64)
DECODE = Case(q_lens=(1, 1, 1), kv_lens=(70, 0, 33), page_size=8, max_q_len=1)
MIXED = Case(q_lens=(1, 40, 0, 5), kv_lens=(60, 40, 3, 9), page_size=5, padding=2)


@pytest.fixture
def in_pairs(monkeypatch):
    """Caches are made as on a TPU."""
    monkeypatch.setattr(kv_cache, "heads_in_a_row", lambda head_dim: 2 if head_dim == 64 else 1)


def caches(monkeypatch, heads, dtype):
    """An empty plain cache, and one with heads in pairs."""
    sizes = dict(num_kv_heads=heads, dtype=dtype, **SIZES)
    plain = init_kv_cache(**sizes)
    monkeypatch.setattr(kv_cache, "heads_in_a_row", lambda _: 2)
    return plain, init_kv_cache(**sizes)


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_cache_for_a_tpu(heads, dtype):
    device = AbstractDevice("TPU v5 lite", None, "tpu")
    sizes = dict(num_kv_heads=heads, dtype=dtype)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        cache = jax.eval_shape(lambda: init_kv_cache(**SIZES, **sizes))
        wide = jax.eval_shape(lambda: init_kv_cache(**SIZES | dict(head_dim=128), **sizes))
        counted = memory.bytes_per_token(num_layers=2, head_dim=64, **sizes)
    pairs = (heads + 1) // 2
    assert cache.k_pages.shape == cache.v_pages.shape == (2, 6, pairs, 4, 128)
    assert (cache.num_kv_heads, cache.head_dim, cache.page_size) == (heads, 64, 4)
    allocated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert cache.bytes_per_page * 6 == allocated
    assert cache.bytes_per_token == counted
    assert wide.k_pages.shape == (2, 6, heads, 4, 128)
    assert (wide.num_kv_heads, wide.heads_per_row) == (heads, 1)
    plain = jax.eval_shape(lambda: init_kv_cache(**SIZES, **sizes))
    assert plain.k_pages.shape == (2, 6, heads, 4, 64)


@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
def test_a_pool_in_pairs_does_what_a_plain_one_does(monkeypatch, heads, dtype):
    tables = jnp.asarray([[3, 1, 6], [5, 0, 6]], jnp.int32)
    slots = jnp.asarray([*range(12, 16), *range(4, 7), -1, 24, *range(20, 24)], jnp.int32)
    k, v = drawn(len(slots), heads, 64), drawn(len(slots), heads, 64) + 1
    copies = PageCopies(src=jnp.asarray([5]), dst=jnp.asarray([0]), count=jnp.int32(1))
    q, found = drawn(2, 2 * heads, 64), []
    for cache in caches(monkeypatch, heads, dtype):
        cache = kv_cache.write(cache, jnp.int32(1), slots, k, v)
        cache = kv_cache.copy_pages(cache, copies)
        cache = kv_cache.move_slots(cache, [12, 13], [13, 12])
        o, lse = paged_attention(
            q, cache.k_pages, cache.v_pages, k_scales=cache.k_scales, v_scales=cache.v_scales,
            block_tables=tables, kv_lens=jnp.asarray([7, 8], jnp.int32), layer=1,
            cu_q_lens=jnp.arange(3, dtype=jnp.int32), num_kv_heads=cache.num_kv_heads,
            return_lse=True,
        )  # fmt: skip
        found.append((o, lse))
        gone = kv_cache.scrub(cache, jnp.asarray([0, 1, 3, 5]), 0, 4)
        assert not any(np.asarray(x, np.float32).any() for x in jax.tree.leaves(gone))
    assert np.abs(found[0][0]).max() > 0.5
    for plain, pairs in zip(*found, strict=True):
        np.testing.assert_allclose(pairs, plain, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (6, 3), (5, 1)])
@pytest.mark.parametrize("page_dtype", [None, "int8"])
@pytest.mark.parametrize("case", [DECODE, MIXED], ids=["decode", "mixed"])
def test_the_reference_reads_pairs(case, page_dtype, heads):
    case = dataclasses.replace(
        case, heads=heads, page_dtype=page_dtype, layers=2, sinks=True, window=30, soft_cap=20.0
    )
    inputs = cases.poison(cases.make(case))
    pairs = cases.paired(inputs)
    arrays = (jnp.asarray(x) for x in (pairs.q, pairs.k_pages, pairs.v_pages))
    o, lse = paged_attention(*arrays, return_lse=True, **pairs.options)
    want_o, want_lse = cases.oracle(inputs)
    np.testing.assert_allclose(o, want_o, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_gradients_go_through_pairs():
    inputs = cases.make(dataclasses.replace(MIXED, heads=(6, 3)))
    pairs = cases.paired(inputs)

    def grads(inputs):
        return jax.grad(
            lambda *arrays: (paged_attention(*arrays, **inputs.options) ** 2).sum(), (0, 1, 2)
        )(*(jnp.asarray(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages)))

    dq, dk, dv = (np.asarray(x) for x in grads(inputs))
    want = cases.paired(dataclasses.replace(inputs, q=dq, k_pages=dk, v_pages=dv))
    for got, expected in zip(grads(pairs), (want.q, want.k_pages, want.v_pages), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_pairs_over_a_mesh_with_explicit_axes():
    pairs = cases.paired(cases.make(dataclasses.replace(DECODE, heads=(8, 4), sinks=True)))
    mesh = AbstractMesh((2,), ("m",), axis_types=(AxisType.Explicit,))
    heads = NamedSharding(mesh, PartitionSpec(None, "m"))
    args = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=heads)
        for x in (pairs.q, pairs.k_pages, pairs.v_pages)
    )
    with use_abstract_mesh(mesh):
        o, lse = jax.eval_shape(
            lambda *args: paged_attention(*args, return_lse=True, **pairs.options), *args
        )
    assert [tuple(x.sharding.spec) for x in (o, lse)] == [(None, "m", None), (None, "m")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_kv_heads=None), r"in pairs, .*say how many with num_kv_heads= \(of a KVCache"),
        (dict(num_kv_heads=2), "num_kv_heads=2 must be 4, the heads of"),
        (dict(k_scales=np.ones((14, 2, 8), jnp.bfloat16)), r"must be \(\d+, 4, 8\): one for each"),
    ],
)
def test_pairs_are_checked(changes, message):
    inputs = cases.make(dataclasses.replace(DECODE, heads=(6, 3), page_dtype="int8"))
    pairs = cases.paired(inputs)
    with pytest.raises(ValueError, match=message):
        paged_attention(pairs.q, pairs.k_pages, pairs.v_pages, **pairs.options | changes)


def test_plain_pages_have_as_many_heads_as_is_said():
    inputs = cases.make(DECODE)
    arrays = inputs.q, inputs.k_pages, inputs.v_pages
    assert explain(*arrays, **inputs.options, num_kv_heads=2).implementation == "reference"
    with pytest.raises(ValueError, match="num_kv_heads=1 must be 2, the heads of"):
        attention_schedule(
            *arrays, num_kv_heads=1, **{x: inputs.options[x] for x in (
                "block_tables", "kv_lens", "cu_q_lens"
            )},
        )  # fmt: skip


def test_kernels_for_gpus_decline_pairs():
    pairs = cases.paired(cases.make(dataclasses.replace(DECODE, page_size=16, dtype="bfloat16")))
    device = AbstractDevice("NVIDIA H200", None, "gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        shapes = (
            jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (pairs.q, pairs.k_pages, pairs.v_pages)
        )
        told = explain(*shapes, implementation="mosaic_gpu", **pairs.options)
    assert told.implementation is None
    assert "no KV heads that lie side by side in pairs" in told.reasons[0][1]


@pytest.mark.parametrize("page_dtype", [None, "int8"])
def test_what_is_measured_lies_as_a_cache_does(page_dtype, monkeypatch):
    work = measure.Workload(
        rows=((1, 20), (3, 9)), num_q_heads=8, num_kv_heads=4, head_dim=64, page_size=4,
        dtype="float32", page_dtype=page_dtype,
    )  # fmt: skip
    plain = measure.make_inputs(work, turns=1)
    monkeypatch.setattr(measure, "heads_in_a_row", lambda _: 2)
    pairs = measure.make_inputs(work, turns=1)
    assert pairs.k_pages.shape == (8, 2, 4, 128)
    found, expected = (measure.right_answer(work, x, 1) for x in (pairs, plain))
    np.testing.assert_allclose(found, expected, atol=1e-5)


CONFIG = dataclasses.replace(
    tiny_config(vocab_size=61, max_positions=64), head_dim=64, num_heads=6, num_kv_heads=3
)
PROMPTS = [[7, 8, 9, 10, 11], [7, 8, 9, 10, 30, 31], [40, 2]]


def test_models_generate_the_same(in_pairs, monkeypatch):
    options = dict(max_new_tokens=8, page_size=4)
    out = generate(Decoder(CONFIG, rngs=nnx.Rngs(0), stacked=True), PROMPTS, **options)
    assert out.stats.bytes_per_page == CONFIG.num_layers * 2 * 4 * 4 * 64 * 4
    monkeypatch.setattr(kv_cache, "heads_in_a_row", lambda _: 1)
    jax.clear_caches()
    plain = generate(Decoder(CONFIG, rngs=nnx.Rngs(0), stacked=True), PROMPTS, **options)
    assert plain.stats.bytes_per_page == CONFIG.num_layers * 2 * 3 * 4 * 64 * 4
    assert [x.tokens for x in out.completions] == [x.tokens for x in plain.completions]


@pytest.mark.slow
def test_a_server_is_saved_and_restored_in_pairs(in_pairs, monkeypatch, tmp_path):
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))

    def engine():
        return Engine(
            model, num_pages=32, page_size=4, max_seqs=3, max_requests=4, max_tokens=24,
            step_tokens=8, kv_dtype="int8",
        )  # fmt: skip

    expected = [x.tokens for x in engine().generate(PROMPTS, max_new_tokens=8)]
    served, other = engine(), engine()
    for prompt in PROMPTS:
        served.add_request(prompt, max_new_tokens=8)
    served.step()
    served.save(tmp_path / "state")
    found = {i: [] for i in range(len(PROMPTS))}
    for delta in [*other.restore(tmp_path / "state"), *other.drain()]:
        found[delta.index] += delta.tokens
    assert list(found.values()) == expected
    monkeypatch.setattr(kv_cache, "heads_in_a_row", lambda _: 1)
    with pytest.raises(SnapshotError, match="heads_per_row=2 there, 1 here"):
        engine().restore(tmp_path / "state")


@pytest.mark.parametrize(("devices", "split"), [(2, "heads"), (4, None)])
def test_a_server_keeps_pairs_together(in_pairs, devices, split):
    config = dataclasses.replace(CONFIG, num_heads=4, num_kv_heads=4)
    sizes = dict(num_pages=4, page_size=4, max_seqs=1, max_requests=1, max_tokens=8, step_tokens=4)
    model = Decoder(config, rngs=nnx.Rngs(0))
    state = jax.eval_shape(lambda: init_serve(model, **sizes))
    shardings = placing._shardings(state, AbstractMesh((devices,), ("heads",)), ("heads",))
    assert shardings.pool.cache.k_pages.spec[2] == split
