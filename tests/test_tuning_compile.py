"""Every config that a tuning table may hold, compiled for an H200: registers, spills, memory."""

import dataclasses
import itertools

import gpu_compile
import jax
import jax.numpy as jnp
import pytest
from test_mosaic_gpu_compile import HEADS, shapes
from test_mosaic_gpu_prefill_compile import HEADS as PREFILL_HEADS

from paxattn.attention import paged_attention, tuning
from paxattn.attention.mosaic_gpu import config, prefill_config, tunable

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(gpu_compile.why_not() is not None, reason=str(gpu_compile.why_not())),
    pytest.mark.timeout(300),
]
VARIANTS = {
    "plain": dict(dtype="bfloat16"),
    "capped": dict(dtype="float16", soft_cap=50.0),
    "int8": dict(dtype="bfloat16", page_dtype="int8"),
    "fp8": dict(dtype="float16", soft_cap=50.0, page_dtype="float8_e4m3fn"),
}
if jax.__version_info__ < (0, 11):  # which declines quantised pages
    VARIANTS = {name: one for name, one in VARIANTS.items() if "page_dtype" not in one}


def is_quantized(variant):
    return "page_dtype" in VARIANTS[variant]


def decode_name(rows, head_dim, page_size, variant, c):
    return f"q{rows}-d{head_dim}-p{page_size}-{variant}-{c.block_kv}x{c.stages}x{c.num_cores}"


def prefill_name(head_dim, page_size, variant, c):
    return f"d{head_dim}-p{page_size}-{variant}-{c.block_kv}x{c.stages}x{c.num_ctas}"


def extremes(configs):
    """Of configs that differ in stages those with the fewest and the most: registers are alike."""
    alike = {}
    for one in configs:
        alike.setdefault(dataclasses.replace(one, stages=0), []).append(one)
    return [one for group in alike.values() for one in dict.fromkeys((group[0], group[-1]))]


DECODE = {
    decode_name(rows, head_dim, page_size, variant, one): (rows, head_dim, page_size, variant, one)
    for rows, head_dim, page_size, variant in itertools.product(
        HEADS, config.HEAD_DIMS, (8, 16, 128), VARIANTS
    )
    if rows <= config.max_rows(head_dim, quantized=is_quantized(variant))
    if not is_quantized(variant) or head_dim in config.QUANTIZED_HEAD_DIMS
    for one in extremes(
        tunable.decode_candidates(
            rows=rows, head_dim=head_dim, page_size=page_size, quantized=is_quantized(variant)
        )
    )
}
PREFILL = {
    prefill_name(head_dim, page_size, variant, one): (head_dim, page_size, variant, one)
    for head_dim, page_size, variant in itertools.product(config.HEAD_DIMS, (16, 128), VARIANTS)
    if not is_quantized(variant) or head_dim in prefill_config.QUANTIZED_HEAD_DIMS
    for one in extremes(
        tunable.prefill_candidates(
            head_dim=head_dim, page_size=page_size, quantized=is_quantized(variant)
        )
    )
}


def decode(rows, head_dim, page_size, variant, chosen):
    """The public op with a table that says so."""
    options = dict(VARIANTS[variant])
    dtype, page_dtype = options.pop("dtype"), options.pop("page_dtype", None)
    given = shapes(
        rows=rows, head_dim=head_dim, page_size=page_size, dtype=jnp.dtype(dtype),
        page_dtype=page_dtype and jnp.dtype(page_dtype),
    )  # fmt: skip
    entry = tuning.Entry(
        device="NVIDIA H200",
        kernel="mosaic_gpu.decode",
        key=tuning.key_of(
            page_dtype, dtype=dtype, head_dim=head_dim, page_size=page_size, rows=rows
        ),
        config=dict(block_kv=chosen.block_kv, stages=chosen.stages, num_cores=chosen.num_cores),
    )

    def run(given):
        with tuning.use([entry]):
            return paged_attention(
                **given, **options, max_q_len=HEADS[rows][2], implementation="mosaic_gpu"
            )

    return run, (given,)


def prefill(head_dim, page_size, variant, chosen):
    """The same for the prefill kernel."""
    options = dict(VARIANTS[variant])
    dtype, page_dtype = options.pop("dtype"), options.pop("page_dtype", None)
    shape = jax.ShapeDtypeStruct
    pages = shape((2, 20_000, PREFILL_HEADS, page_size, head_dim), jnp.dtype(page_dtype or dtype))
    given = dict(
        q=shape((2048, PREFILL_HEADS * 4, head_dim), jnp.dtype(dtype)),
        k_pages=pages,
        v_pages=pages,
        block_tables=shape((16, 256), jnp.int32),
        kv_lens=shape((16,), jnp.int32),
        cu_q_lens=shape((17,), jnp.int32),
        layer=shape((), jnp.int32),
        sliding_window=shape((), jnp.int32),
    )
    if page_dtype is not None:
        given["k_scales"] = given["v_scales"] = shape(pages.shape[:-1], jnp.bfloat16)
    entry = tuning.Entry(
        device="NVIDIA H200",
        kernel="mosaic_gpu.prefill",
        key=tuning.key_of(page_dtype, dtype=dtype, head_dim=head_dim, page_size=page_size),
        config=dict(block_kv=chosen.block_kv, stages=chosen.stages, num_ctas=chosen.num_ctas),
    )

    def run(given):
        with tuning.use([entry]):
            return paged_attention(**given, **options, implementation="mosaic_gpu")

    return run, (given,)


def program(name):
    """For the process that compiles: `(function, arguments)`."""
    return decode(*DECODE[name]) if name in DECODE else prefill(*PREFILL[name])


def check(name, facts):
    found = {kernel["name"]: kernel for kernel in facts["kernels"]}
    assert sum(kernel["spills"] for kernel in facts["kernels"]) == 0, name
    if name in PREFILL:
        head_dim, _, _, chosen = PREFILL[name]
        kernel = found["paged_prefill"]
        ring = 2 * 2 * chosen.places * chosen.block_kv * head_dim
        ring += 2 * chosen.stages * chosen.block_kv * head_dim if chosen.wide else 0
        assert ring < kernel["shared"] <= config.SHARED_BYTES, name
        # Three warpgroups share a multiprocessor's, or four.
        assert kernel["registers"] <= (128 if chosen.wide else 168), name
        return
    rows, head_dim, _, variant, chosen = DECODE[name]
    kernel, per_sm = found["paged_decode"], chosen.num_cores // 132
    assert kernel["registers"] <= 65536 // 256 // per_sm, name
    quantized = is_quantized(variant)
    needed = config.shared_bytes(chosen, rows=rows, head_dim=head_dim, quantized=quantized)
    assert needed <= kernel["shared"] <= config.SHARED_BYTES // per_sm - 1024, name


def test_the_table_decides_what_is_built():
    """Two configs of the same call, neither the heuristic's."""
    names = [
        decode_name(8, 128, 16, "plain", config.Config(block_kv=b, stages=s, num_cores=132))
        for b, s in ((64, 6), (128, 3))
    ]
    assert config.default_config(rows=8, head_dim=128, page_size=16) not in [
        DECODE[name][-1] for name in names
    ]
    found = gpu_compile.compile_programs("test_tuning_compile", names)
    for name in names:
        check(name, found[name])
    built = [{k["name"]: k for k in found[name]["kernels"]}["paged_decode"] for name in names]
    assert built[0] != built[1]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(DECODE), 20))
def test_all_decode_candidates_compile(first):
    names = list(DECODE)[first : first + 20]
    for name, facts in gpu_compile.compile_programs("test_tuning_compile", names).items():
        check(name, facts)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(PREFILL), 20))
def test_all_prefill_candidates_compile(first):
    names = list(PREFILL)[first : first + 20]
    for name, facts in gpu_compile.compile_programs("test_tuning_compile", names).items():
        check(name, facts)
