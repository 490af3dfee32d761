"""The decode kernel compiled for an H200 without one: layouts, registers, spills, shared memory."""

import functools
import itertools

import gpu_compile
import jax
import jax.numpy as jnp
import pytest

from paxattn import kv_cache
from paxattn.attention import paged_attention, paged_attention_decode
from paxattn.attention.mosaic_gpu import config, support

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(gpu_compile.why_not() is not None, reason=str(gpu_compile.why_not())),
    pytest.mark.timeout(300),
]

# packed query rows: (query heads, KV heads, tokens per row)
HEADS = {
    8: (32, 8, 1), 16: (16, 1, 1), 24: (64, 8, 3), 32: (32, 8, 8), 48: (64, 8, 6), 64: (32, 8, 16),
}  # fmt: skip
L, N, R, M = 2, 1000, 64, 256


def shapes(*, rows, head_dim, page_size, dtype=jnp.bfloat16, batch=R, layers=L, page_dtype=None):
    heads, kv_heads, tokens = HEADS[rows]
    shape = jax.ShapeDtypeStruct
    pages = shape((layers, N, kv_heads, page_size, head_dim), page_dtype or dtype)
    scales = shape(pages.shape[:-1], jnp.bfloat16)
    return dict(
        **({} if page_dtype is None else dict(k_scales=scales, v_scales=scales)),
        q=shape((batch * tokens, heads, head_dim), dtype),
        k_pages=pages,
        v_pages=pages,
        block_tables=shape((batch, M), jnp.int32),
        kv_lens=shape((batch,), jnp.int32),
        cu_q_lens=shape((batch + 1,), jnp.int32),
        layer=shape((), jnp.int32),
        sliding_window=shape((), jnp.int32),
    )


def kernel(
    *, rows, head_dim, page_size, dtype=jnp.bfloat16, soft_cap=None, causal=True, page_dtype=None
):
    """The kernel alone, as the heuristic configures it, and its arguments."""
    from paxattn.attention import schedule
    from paxattn.attention.mosaic_gpu.decode import attend
    from paxattn.attention.mosaic_gpu.decode_refs import Tile

    heads, kv_heads, tokens = HEADS[rows]
    tile = Tile(
        rows=rows, head_dim=head_dim, page_size=page_size, num_pages=N, max_pages=M,
        group=heads // kv_heads, single=tokens == 1, causal=causal, soft_cap=soft_cap,
        dtype=dtype if page_dtype is None else config.wide_dtype(page_dtype),
        config=config.default_config(
            rows=rows, head_dim=head_dim, page_size=page_size, quantized=page_dtype is not None
        ), page_dtype=page_dtype,
    )  # fmt: skip
    given = shapes(
        rows=rows, head_dim=head_dim, page_size=page_size, dtype=dtype, page_dtype=page_dtype
    )
    for name in ("cu_q_lens", "sliding_window"):
        del given[name]
    given["q"] = jax.ShapeDtypeStruct((R, kv_heads, rows, head_dim), tile.dtype)
    lens = given.pop("kv_lens")
    given["schedule"] = jax.eval_shape(
        functools.partial(
            schedule.schedule_decode, num_kv_heads=kv_heads, page_size=page_size,
            max_pages_per_seq=M, block_kv=tile.config.block_kv, num_cores=tile.config.num_cores,
        ), lens, lens, 0,
    )  # fmt: skip

    def run(given):
        given, one = dict(given), jnp.int32(1)
        arrays = [
            given.pop(name)
            for name in ("q", "k_pages", "v_pages", "k_scales", "v_scales")
            if name in given
        ]
        options = dict(sliding_window=one, sm_scale=jnp.float32(1), tile=tile, out_dtype=dtype)
        return attend(*arrays, **given, **options)

    return run, (given,)


ASKED = {"implementation": "mosaic_gpu"}


def decode_op():
    """The public op."""
    given = shapes(rows=8, head_dim=128, page_size=16)
    del given["cu_q_lens"]
    return lambda given: paged_attention_decode(**given, return_lse=True, **ASKED), (given,)


def verify_op():
    """Speculation in a mixed batch, with every option."""
    given = shapes(rows=32, head_dim=80, page_size=16, dtype=jnp.float16)
    given["sinks"] = jax.ShapeDtypeStruct((32,), jnp.float32)
    given["sm_scale"] = jax.ShapeDtypeStruct((), jnp.float32)
    return lambda given: paged_attention(**given, max_q_len=8, soft_cap=30.0, **ASKED), (given,)


def decode_layers():
    """Writing and reading in turn, layer after layer: the pool must not be copied."""
    given = shapes(rows=8, head_dim=128, page_size=16, layers=4)
    pool = given.pop("k_pages")
    given = dict(q=given["q"], tables=given["block_tables"], lens=given["kv_lens"])

    def steps(given, pools):
        def layer(carry, i):
            q, pools = carry
            page = given["tables"][:, 0]
            new = q.reshape(R, 8, 4, 128)[:, :, 0]
            k, v = (x.at[i, page, :, 3].set(new, mode="drop", unique_indices=True) for x in pools)
            o = paged_attention_decode(
                q, k, v, block_tables=given["tables"], kv_lens=given["lens"], layer=i, **ASKED
            )
            return (q + o, (k, v)), None

        return jax.lax.scan(layer, (given["q"], pools), jnp.arange(4))[0]

    return jax.jit(steps, donate_argnums=1), (given, (pool, pool))


def quantized_layers():
    """The same with quantised pages and their scales."""
    given = shapes(rows=8, head_dim=128, page_size=16, layers=4)
    cache = jax.eval_shape(
        lambda: kv_cache.init_kv_cache(
            num_layers=4, num_pages=N, page_size=16, num_kv_heads=8, head_dim=128, dtype="fp8"
        )
    )
    given = dict(q=given["q"], tables=given["block_tables"], lens=given["kv_lens"])

    def steps(given, cache):
        def layer(carry, i):
            q, cache = carry
            new = q.reshape(R, 8, 4, 128)[:, :, 0]
            cache = kv_cache.write(cache, i, given["tables"][:, 0] * 16 + 3, new, new)
            o = paged_attention_decode(
                q, cache.k_pages, cache.v_pages, k_scales=cache.k_scales, v_scales=cache.v_scales,
                block_tables=given["tables"], kv_lens=given["lens"], layer=i, **ASKED,
            )  # fmt: skip
            return (q + o, cache), None

        return jax.lax.scan(layer, (given["q"], cache), jnp.arange(4))[0]

    return jax.jit(steps, donate_argnums=1), (given, cache)


def name_of(rows, head_dim, page_size, **options):
    more = "".join(f"-{k}={getattr(v, '__name__', v)}" for k, v in options.items())
    return f"q{rows}-d{head_dim}-p{page_size}{more}"


FEW = [
    dict(rows=8, head_dim=128, page_size=16),
    dict(rows=8, head_dim=64, page_size=8, dtype=jnp.float16, soft_cap=50.0),
    dict(rows=8, head_dim=80, page_size=16),
    dict(rows=16, head_dim=128, page_size=128),
    dict(rows=24, head_dim=256, page_size=64, soft_cap=50.0),
    dict(rows=48, head_dim=128, page_size=16, soft_cap=50.0),
    dict(rows=64, head_dim=64, page_size=32, dtype=jnp.float16),
    dict(rows=8, head_dim=128, page_size=16, page_dtype=jnp.float8_e4m3fn),
    dict(rows=16, head_dim=128, page_size=16, page_dtype=jnp.int8, soft_cap=50.0),
    dict(rows=48, head_dim=128, page_size=128, page_dtype=jnp.int8),
    dict(rows=16, head_dim=256, page_size=8, page_dtype=jnp.int8, soft_cap=50.0),
]
ALL = [
    dict(rows=rows, head_dim=head_dim, page_size=page_size, **more)
    for rows, head_dim, page_size, more in itertools.product(
        HEADS,
        config.HEAD_DIMS,
        support.PAGE_SIZES,
        (dict(), dict(dtype=jnp.float16, soft_cap=50.0), dict(causal=False)),
    )
    if rows <= config.max_rows(head_dim)
] + [
    dict(rows=rows, head_dim=head_dim, page_size=page_size, **more)
    for rows, head_dim, page_size, more in itertools.product(
        HEADS,
        config.QUANTIZED_HEAD_DIMS,
        support.PAGE_SIZES,
        (dict(page_dtype=jnp.float8_e4m3fn), dict(page_dtype=jnp.int8, soft_cap=50.0)),
    )
    if rows <= config.max_rows(head_dim, quantized=True)
]
if jax.__version_info__ < (0, 11):  # which declines quantised pages
    FEW, ALL = ([case for case in cases if "page_dtype" not in case] for cases in (FEW, ALL))
KERNELS = {name_of(**case): case for case in [*FEW, *ALL]}
WHOLE = {f.__name__: f for f in (decode_op, verify_op, decode_layers)}
if jax.__version_info__ >= (0, 11):
    WHOLE["quantized_layers"] = quantized_layers


def program(name):
    """For the process that compiles: `(function, arguments)`."""
    return kernel(**KERNELS[name]) if name in KERNELS else WHOLE[name]()


def check_kernel(case, facts):
    (found,) = facts["kernels"]
    chosen = config.default_config(
        rows=case["rows"],
        head_dim=case["head_dim"],
        page_size=case["page_size"],
        quantized="page_dtype" in case,
    )
    per_sm = chosen.num_cores // 132
    assert found["name"] == "paged_decode"
    assert found["spills"] == 0
    # A thread block is 256 threads; a multiprocessor has 65536 registers and 227 KiB.
    assert found["registers"] <= 65536 // 256 // per_sm
    assert found["shared"] <= 227 * 1024 // per_sm - 1024  # (1 KiB of each is the system's)
    assert found["aligned"] >= 128


def test_kernels_within_budget():
    names = [name_of(**case) for case in FEW]
    found = gpu_compile.compile_programs("test_mosaic_gpu_compile", names)
    assert list(found) == names
    for name in names:
        check_kernel(KERNELS[name], found[name])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(ALL), 20))
def test_all_kernels_within_budget(first):
    names = [name_of(**case) for case in ALL[first : first + 20]]
    found = gpu_compile.compile_programs("test_mosaic_gpu_compile", names)
    for name in names:
        # (with one token to a row, causal or not is the same kernel, which is listed once)
        if found[name]["kernels"] or KERNELS[name].get("causal", True):
            check_kernel(KERNELS[name], found[name])


def test_whole_op():
    """The op picks the kernels by itself, and nothing as large as the pool or the tables exists."""
    found = gpu_compile.compile_programs("test_mosaic_gpu_compile", list(WHOLE))
    for name, facts in found.items():
        assert {"merge_parts", "paged_decode"} <= {
            *facts["scopes"],
            *(k["name"] for k in facts["kernels"]),
        }, name
        assert sum(k["spills"] for k in facts["kernels"]) == 0, name
        assert facts["temp"] < L * N * 8 * 16 * 80 * 2, name  # one pool, the smallest of these
    pool = 4 * N * 8 * 16 * 128 * 2
    assert found["decode_layers"]["alias"] >= 2 * pool
    # In each layer: numbers and queries are laid out, attended to, and pieces merged. (What comes
    # back is put in place by the kernel that needs it.)
    assert found["decode_layers"]["launches"]["attend_batch"] <= 4
    if "quantized_layers" in found:
        assert found["quantized_layers"]["alias"] >= pool
