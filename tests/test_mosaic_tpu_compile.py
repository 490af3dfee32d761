"""The kernel compiled for TPUs that are not there: tiles, vector and scalar memory, the pool."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest
import tpu_compiler
from flax import nnx

from paxattn import kv_cache, page_table, quantized
from paxattn.attention import paged_attention
from paxattn.attention.mosaic_tpu.config import scales_lie_ready
from paxattn.models import Decoder, DecoderConfig
from paxattn.ragged import ragged_batch

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(tpu_compiler.why_not() is not None, reason=str(tpu_compiler.why_not())),
    pytest.mark.timeout(300),
]

L, R, M = 2, 64, 8192  # block tables of 2 MiB: more than scalar memory holds
POOL = 2**29  # bytes of a layer's K in pages of floats
SCALES = 2**24  # bytes of those of a layer's K, in quantised pages
GENERATIONS = list(tpu_compiler.TOPOLOGIES)


def op(
    *, heads, head_dim, page_size, tokens=1, dtype=jnp.bfloat16, page_dtype=None, window=False,
    sinks=False, **static,
):  # fmt: skip
    """The public op for batches of up to `tokens` new tokens per row, and its arguments."""
    shape = jax.ShapeDtypeStruct
    together = 2 if head_dim == kv_cache.PAIRED_HEAD_DIM else 1
    rows = -(-heads[1] // together)
    num_pages = POOL // (rows * page_size * together * head_dim * dtype.dtype.itemsize)
    if page_dtype is not None:
        num_pages = SCALES // 2 // heads[1] // page_size
    pages = shape((L, num_pages, rows, page_size, together * head_dim), page_dtype or dtype)
    given = dict(
        q=shape((max(tokens, R), heads[0], head_dim), dtype),
        k_pages=pages,
        v_pages=pages,
        block_tables=shape((R, M), jnp.int32),
        kv_lens=shape((R,), jnp.int32),
        cu_q_lens=shape((R + 1,), jnp.int32),
        layer=shape((), jnp.int32),
    )
    if page_dtype is not None:
        scales = shape((L, num_pages, rows * together, page_size), jnp.bfloat16)
        given |= dict.fromkeys(("k_scales", "v_scales"), scales)
    if window:
        given["sliding_window"] = shape((), jnp.int32)
    if sinks:
        given["sinks"] = shape((heads[0],), jnp.float32)
    static |= dict(num_kv_heads=heads[1], max_q_len=tokens, return_lse=True)
    static |= dict(implementation="mosaic_tpu")
    return lambda given: paged_attention(**given, **static), (given,)


def layer_step(*, heads, page_size, page_dtype):
    """A layer writes a token of each row, and attends; heads of 64, the pool is donated."""

    def run(cache, q, k, slots, batch):
        cache = kv_cache.write(cache, 1, slots, k, k)
        static = dict(num_kv_heads=cache.num_kv_heads, max_q_len=1, implementation="mosaic_tpu")
        scales = dict(k_scales=cache.k_scales, v_scales=cache.v_scales)
        o = paged_attention(
            q, cache.k_pages, cache.v_pages, layer=1, **(scales if page_dtype else {}), **batch,
            **static,
        )  # fmt: skip
        return cache, o

    shape, rows = jax.ShapeDtypeStruct, -(-heads[1] // 2)
    pages = shape((L, WRITTEN, rows, page_size, 128), page_dtype or jnp.bfloat16)
    scales = shape((L, WRITTEN, 2 * rows, page_size), jnp.bfloat16) if page_dtype else None
    cache = kv_cache.KVCache(
        k_pages=pages, v_pages=pages, k_scales=scales, v_scales=scales, heads_per_row=2,
        spare_heads=heads[1] % 2,
    )  # fmt: skip
    q, k = (shape((R, n, 64), jnp.bfloat16) for n in heads)
    batch = dict(
        block_tables=shape((R, M), jnp.int32),
        kv_lens=shape((R,), jnp.int32),
        cu_q_lens=shape((R + 1,), jnp.int32),
    )
    return jax.jit(run, donate_argnums=0), (cache, q, k, shape((R,), jnp.int32), batch)


WRITTEN = 20_000
WRITES = {
    "write-k8-p16": dict(heads=(32, 8), page_size=16, page_dtype=None),
    "write-k3-p128": dict(heads=(9, 3), page_size=128, page_dtype=None),
    "write-k8-p128-int8": dict(heads=(32, 8), page_size=128, page_dtype=jnp.int8),
}
FEW = {
    "decode": dict(heads=(32, 8), head_dim=128, page_size=16),
    "decode-d64": dict(heads=(9, 3), head_dim=64, page_size=16, window=True, soft_cap=50.0),
    "verify-d256": dict(heads=(16, 1), head_dim=256, page_size=256, tokens=4, sinks=True),
    "mixed": dict(heads=(32, 8), head_dim=128, page_size=16, tokens=128, window=True),
    "decode-fp8": dict(heads=(32, 8), head_dim=128, page_size=16, page_dtype=jnp.float8_e4m3fn),
}
ALL = {
    f"h{q}k{kv}-d{head_dim}-p{page_size}-t{tokens}-{dtype.__name__}": dict(
        heads=(q, kv), head_dim=head_dim, page_size=page_size, tokens=tokens, dtype=dtype, **more
    )
    for (q, kv), head_dim, page_size, tokens, (dtype, more) in itertools.product(
        ((32, 8), (32, 32), (5, 1), (14, 2), (16, 1)),
        (64, 128, 256),
        (16, 48, 128, 256),
        (1, 4, 256),
        (
            (jnp.bfloat16, dict(window=True)),
            (jnp.float32, dict(soft_cap=50.0, sinks=True)),
        ),
    )
}
NUMBERS = itertools.cycle(
    itertools.product((jnp.bfloat16, jnp.float32), (jnp.int8, jnp.float8_e4m3fn))
)
ALL |= {
    f"h{q}k{kv}-d{head_dim}-p{page_size}-t{tokens}-{dtype.__name__}-{page_dtype.__name__}": dict(
        heads=(q, kv), head_dim=head_dim, page_size=page_size, tokens=tokens, dtype=dtype,
        page_dtype=page_dtype, window=True,
    )
    for (tokens, (q, kv), head_dim, page_size), (dtype, page_dtype) in zip(
        itertools.product(
            (1, 256),
            ((32, 8), (32, 32), (10, 5), (14, 2), (5, 1)),
            (64, 128, 256),
            (16, 32, 64, 128, 256),
        ),
        NUMBERS,
        strict=False,
    )
}  # fmt: skip

ROWS, MAX_PAGES = 256, 8_191
# Layers and pages that a chip has the memory for (primes: found again anywhere). The 16 GB of a v5e
# do not hold all the weights.
STEPS = {
    "v5p": (32, 32_749, 16, jnp.bfloat16),
    "tpu7x": (32, 32_749, 16, jnp.bfloat16),
    "v6e": (32, 4_001, 16, jnp.bfloat16),
    "v5e": (16, 2_503, 16, jnp.bfloat16),
    "v5p int8": (32, 4_093, 128, jnp.int8),
    "tpu7x fp8": (32, 4_093, 128, jnp.float8_e4m3fn),
    "v6e fp8": (32, 1_009, 128, jnp.float8_e4m3fn),
    "v5e int8": (16, 509, 128, jnp.int8),
}
LLAMA = dict(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_heads=32, num_kv_heads=8,
    head_dim=128,
)  # fmt: skip
# Bytes: of queries, keys and values, of their result, and of the three of the MLP.
LAYER_WEIGHTS = 2 * 4096 * ((32 + 2 * 8) * 128 + 4096 + 3 * 14_336)


def decode_step(num_layers, num_pages, page_size, page_dtype):
    """Reserve, copy, write, attend, append and choose the likeliest token, for 256 rows."""

    def run(pool, model, tokens, q_lens):
        table, cache = pool
        table, ok, copies = page_table.reserve(table, q_lens)
        cache = kv_cache.copy_pages(cache, copies)
        batch = ragged_batch(table, q_lens, num_tokens=ROWS, max_q_len=1, live=ok)
        hidden, cache = model(tokens, batch, cache)
        table, _ = page_table.append(table, jnp.where(ok, q_lens, 0))
        return (table, cache), jnp.argmax(model.logits(hidden), axis=-1)

    model = nnx.eval_shape(
        lambda: Decoder(
            DecoderConfig(num_layers=num_layers, **LLAMA),
            rngs=nnx.Rngs(0),
            dtype=jnp.bfloat16,
            stacked=True,
        )
    )
    pool = jax.eval_shape(
        lambda: (
            page_table.init_page_table(
                num_pages=num_pages, page_size=page_size, max_seqs=ROWS, max_pages_per_seq=MAX_PAGES
            ),
            model.init_cache(num_pages=num_pages, page_size=page_size, dtype=page_dtype),
        )
    )
    tokens = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    return jax.jit(run, donate_argnums=0), (pool, model, tokens, tokens)


def program(name):
    """For the process that compiles: `(function, arguments)`."""
    if name in STEPS:
        return decode_step(*STEPS[name])
    return layer_step(**WRITES[name]) if name in WRITES else op(**(FEW | ALL)[name])


def check_op(name, facts):
    case = (FEW | ALL)[name]
    assert set(facts["kernels"]) == {"paged_ragged"}
    (q_heads, heads), page_size, tokens = case["heads"], case["page_size"], case.get("tokens", 1)
    group = q_heads // heads * (2 if case["head_dim"] == kv_cache.PAIRED_HEAD_DIM else 1)
    assert len(facts["kernels"]) == (2 if tokens * group > 64 else 1)
    if case.get("page_dtype") is None:
        assert facts["temp"] < POOL
    elif tokens <= 4 and heads % 8 == 0:  # what is put in order for the kernel is a layer's
        assert facts["temp"] < (2 if scales_lie_ready(heads, page_size) else 5) * SCALES


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_few_shapes_compile(generation):
    found = tpu_compiler.compile_programs("test_mosaic_tpu_compile", list(FEW), [generation])
    assert [name for name, _ in found] == list(FEW)
    for (name, _), facts in found.items():
        check_op(name, facts)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_heads_in_pairs_are_written_in_place(generation):
    found = tpu_compiler.compile_programs("test_mosaic_tpu_compile", list(WRITES), [generation])
    for (name, _), facts in found.items():
        heads, page_size, page_dtype = WRITES[name].values()
        assert facts["kernels"] == ["paged_ragged"]
        places = L * WRITTEN * (heads[1] + heads[1] % 2) * page_size  # of a token's head
        assert facts["alias"] >= 2 * places * quantized.head_bytes(64, page_dtype or jnp.bfloat16)
        assert facts["temp"] < places * 64 // 32


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("first", range(0, len(ALL), 10))
def test_all_shapes_compile(first, generation):
    names = list(ALL)[first : first + 10]
    found = tpu_compiler.compile_programs("test_mosaic_tpu_compile", names, [generation])
    for (name, _), facts in found.items():
        check_op(name, facts)


@pytest.mark.parametrize(
    "name",
    [g if g in ("v5e", "v6e", "v5p") else pytest.param(g, marks=pytest.mark.slow) for g in STEPS],
)
def test_a_decode_step_updates_the_pool_in_place_and_materialises_nothing_large(name):
    ((_, facts),) = tpu_compiler.compile_programs(
        "test_mosaic_tpu_compile", [name], [name.split()[0]]
    ).items()
    assert facts["kernels"] == ["paged_ragged"]
    num_layers, num_pages, page_size, page_dtype = STEPS[name]
    # Bytes of a layer's K.
    tokens = num_pages * LLAMA["num_kv_heads"] * page_size
    pool = tokens * quantized.head_bytes(LLAMA["head_dim"], page_dtype)
    assert facts["alias"] >= 2 * num_layers * pool
    logits = ROWS * LLAMA["vocab_size"] * 4
    most = pool if pool > 2 * logits else pool + logits
    if name.startswith("tpu7x"):  # puts weights into other tiles before any scan over them
        most += num_layers * LAYER_WEIGHTS
    assert facts["temp"] < most
    # Nothing of [batch, max context] but the block tables, in whatever shape.
    sizes = [math.prod(map(int, shape.split(","))) for shape in facts["shapes"]]
    assert max(size for size in sizes if size % MAX_PAGES == 0) <= ROWS * MAX_PAGES
    # The tiles are cut, but not in the loop over layers.
    assert "plan_batch" in facts["scopes"]
    assert "plan_batch" not in facts["looped"]
    assert "attend_batch" in facts["looped"]
