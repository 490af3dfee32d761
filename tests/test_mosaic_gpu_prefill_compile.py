"""The prefill kernel compiled for an H200 without one: layouts, registers, spills, SMEM, memory."""

import itertools

import gpu_compile
import jax
import jax.numpy as jnp
import pytest

from paxattn.attention.mosaic_gpu import config, prefill_config, prefill_tiles

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(gpu_compile.why_not() is not None, reason=str(gpu_compile.why_not())),
    pytest.mark.timeout(300),
]

T, R, M, L, N, HEADS = 2048, 16, 256, 2, 20_000, 8


def name_of(head_dim, page_size, **options):
    more = "".join(f"-{k}={getattr(v, '__name__', v)}" for k, v in options.items())
    return f"d{head_dim}-p{page_size}{more}"


def program(name):
    """For the process that compiles: `(function, arguments)`."""
    from paxattn.attention import checks
    from paxattn.attention.mosaic_gpu.op import attend_batch
    from paxattn.attention.mosaic_gpu.plan import plan_batch

    case = dict(group=4, dtype=jnp.bfloat16, causal=True, window=False, soft_cap=None) | CASES[name]
    head_dim, dtype, shape = case["head_dim"], case["dtype"], jax.ShapeDtypeStruct
    page_dtype = case.get("page_dtype")
    pages = shape((L, N, HEADS, case["page_size"], head_dim), page_dtype or dtype)
    arrays = [shape((T, HEADS * case["group"], head_dim), dtype), pages, pages]
    batch = dict(
        block_tables=shape((R, M), jnp.int32),
        kv_lens=shape((R,), jnp.int32),
        cu_q_lens=shape((R + 1,), jnp.int32),
        sliding_window=shape((), jnp.int32) if case["window"] else None,
    )
    given = dict(layer=shape((), jnp.int32), sm_scale=shape((), jnp.float32), sinks=None)
    if page_dtype is not None:
        given["k_scales"] = given["v_scales"] = shape(pages.shape[:-1], jnp.bfloat16)
    options = dict(causal=case["causal"], soft_cap=case["soft_cap"])
    scales = {name: given[name] for name in ("k_scales", "v_scales") if name in given}
    request = checks.check(*arrays, **batch, **scales, layer=given["layer"], **options)
    chosen = prefill_config.default_config(head_dim=head_dim, quantized=page_dtype is not None)

    def run(arrays, batch, given):
        plan = plan_batch(
            **batch, request=request, short_q_len=0, decode=None, prefill=chosen,
            split_over=case.get("split_over"),
        )  # fmt: skip
        kept = {k: v for k, v in batch.items() if k != "kv_lens"}
        return attend_batch(*arrays, **kept, **given, **options, plan=plan)

    return run, (arrays, batch, given)


OPTIONS = (
    dict(),
    dict(group=5, dtype=jnp.float16, window=True, soft_cap=50.0),
    dict(group=1, window=True),
    dict(group=16, causal=False),
)
ALL = [
    dict(head_dim=head_dim, page_size=page_size, **more)
    for head_dim, page_size, more in itertools.product(
        config.HEAD_DIMS, (8, 16, 32, 64, 128, 256), OPTIONS
    )
] + [
    dict(head_dim=head_dim, page_size=page_size, **more, page_dtype=page_dtype)
    for head_dim, page_size, (more, page_dtype) in itertools.product(
        prefill_config.QUANTIZED_HEAD_DIMS,
        (16, 32, 64, 128, 256),
        zip(OPTIONS, (jnp.int8, jnp.float8_e4m3fn) * 2, strict=True),
    )
]
FEW = [
    dict(head_dim=128, page_size=16),
    dict(head_dim=128, page_size=16, **OPTIONS[1], page_dtype=jnp.float8_e4m3fn),
    dict(head_dim=64, page_size=128, **OPTIONS[2]),
    dict(head_dim=80, page_size=32, **OPTIONS[3]),
    dict(head_dim=256, page_size=8, **OPTIONS[1]),
    dict(head_dim=128, page_size=16, split_over=2000),  # (more than there are tiles)
]
if jax.__version_info__ < (0, 11):  # which declines quantised pages
    FEW, ALL = ([case for case in cases if "page_dtype" not in case] for cases in (FEW, ALL))
CASES = {name_of(**case): case for case in [*FEW, *ALL]}


def check(case, facts):
    (found,) = facts["kernels"]
    assert found["name"] == "paged_prefill"
    assert found["spills"] == 0
    # What all threads begin with: of fewer, there would never be as many as the consumers ask for.
    assert found["registers"] == (168 if case.get("page_dtype") is None else 128)
    assert found["shared"] <= 227 * 1024 - 1024  # (1 KiB is the system's)
    assert found["aligned"] >= 128
    # Nothing is as large as a layer's pages: tiles of queries, tiles of results, small tables.
    group = case.get("group", 4)
    bound = prefill_tiles.max_tiles(num_tokens=T, num_rows=R, group=group, min_packed=1)
    packed = HEADS * bound * prefill_config.TILE
    found = packed
    if "split_over" in case:
        found *= prefill_tiles.max_pieces(
            num_tokens=T, stored=M * case["page_size"], group=group, num_kv_heads=HEADS,
            num_ctas=case["split_over"],
        )  # fmt: skip
        assert found > packed
    # (pieces are merged in float32, all of a token at once)
    size = case["head_dim"] * (2 if found == packed else 6) + 8
    assert facts["temp"] <= packed * case["head_dim"] * 2 + found * size + 2**21


def test_kernels_within_budget():
    names = [name_of(**case) for case in FEW]
    found = gpu_compile.compile_programs("test_mosaic_gpu_prefill_compile", names)
    assert list(found) == names
    for name in names:
        check(CASES[name], found[name])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(ALL), 12))
def test_all_kernels_within_budget(first):
    names = [name_of(**case) for case in ALL[first : first + 12]]
    found = gpu_compile.compile_programs("test_mosaic_gpu_prefill_compile", names)
    for name in names:
        check(CASES[name], found[name])
