"""The portable kernels compiled for Ampere, Ada and Blackwell without a GPU.

Layouts, registers, spills, and shared memory, which the compiler does not check. For Hopper, which
has kernels of its own, those that serve what these decline.
"""

import dataclasses
import functools
import itertools

import gpu_compile
import jax
import jax.numpy as jnp
import pytest
import test_mosaic_gpu_steps_compile as steps

from paxattn.attention import paged_attention
from paxattn.attention import schedule as work
from paxattn.attention.mosaic_gpu import config, prefill_config, prefill_tiles
from paxattn.attention.mosaic_gpu.portable import cards
from paxattn.attention.mosaic_gpu.portable import config as portable

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(gpu_compile.why_not() is not None, reason=str(gpu_compile.why_not())),
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="these kernels need jax 0.11"),
    pytest.mark.timeout(300),
]
CARDS = {
    "a100": cards.card_of("NVIDIA A100-SXM4-80GB"),
    "rtx4090": cards.card_of("NVIDIA GeForce RTX 4090"),
    "b200": cards.card_of("NVIDIA B200"),
    "rtx5090": cards.card_of("NVIDIA GeForce RTX 5090"),
}
H200 = cards.card_of("NVIDIA H200")
EVERY = CARDS | {"h200": H200}
T, R, M, N, HEADS, GROUP = 1024, 16, 256, 2000, 2, 4
VARIANTS = {
    "plain": dict(dtype=jnp.bfloat16, soft_cap=None, window=False, causal=True),
    "capped": dict(dtype=jnp.float16, soft_cap=50.0, window=True, causal=True),
    "open": dict(dtype=jnp.bfloat16, soft_cap=None, window=False, causal=False),
    "int8": dict(dtype=jnp.bfloat16, soft_cap=None, window=False, causal=True),
    "fp8": dict(dtype=jnp.float16, soft_cap=50.0, window=True, causal=True),
}
PAGES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}  # of variants with quantised ones
shape = jax.ShapeDtypeStruct


def given(head_dim, page_size, dtype, page_dtype=None):
    """Pages of K and V (and scales), block tables, lengths, a scalar."""
    pages = [shape((2, N, HEADS, page_size, head_dim), page_dtype or dtype)] * 2
    if page_dtype is not None:
        pages += [shape(pages[0].shape[:-1], jnp.bfloat16)] * 2
    return pages, shape((R, M), jnp.int32), shape((R,), jnp.int32), shape((), jnp.int32)


def decode(card, rows, head_dim, page_size, chosen, *, dtype, page_dtype=None, **options):
    """The decode kernel alone, and the merging."""
    from paxattn.attention.mosaic_gpu.portable.decode import attend_units
    from paxattn.attention.mosaic_gpu.portable.ring import Tile

    pages, tables, lens, scalar = given(head_dim, page_size, dtype, page_dtype)
    sizes = dict(block_kv=chosen.block_kv, num_cores=chosen.num_cores)
    tile = Tile(
        rows=rows, head_dim=head_dim, page_size=page_size, num_pages=N, max_pages=M, group=GROUP,
        dtype=dtype, block_kv=chosen.block_kv, stages=chosen.stages, tma=card.tma, interpret=False,
        page_dtype=page_dtype, **options,
    )  # fmt: skip
    made = jax.eval_shape(
        functools.partial(
            work.schedule_decode, num_kv_heads=HEADS, page_size=page_size, max_pages_per_seq=M,
            **sizes,
        ), lens, lens, 0,
    )  # fmt: skip
    arrays = dict(
        block_tables=tables, stored=lens, schedule=made, layer=scalar, sliding_window=scalar
    )
    arrays |= dict(sm_scale=shape((), jnp.float32))
    q = shape((R, HEADS, rows, head_dim), dtype)

    def run(q, pages, arrays):
        return attend_units(
            q, *pages, **arrays, tile=tile, num_cores=chosen.num_cores, out_dtype=dtype
        )

    return run, (q, pages, arrays)


def prefill(card, rows, head_dim, page_size, chosen, *, dtype, window, page_dtype=None, **options):
    """The prefill kernel, for rows that are cut already."""
    from paxattn.attention.mosaic_gpu.prefill import prefill_attention

    pages, tables, lens, scalar = given(head_dim, page_size, dtype, page_dtype)
    ends = shape((R + 1,), jnp.int32)
    cut = functools.partial(
        prefill_tiles.cut, window=None, causal=True, num_tokens=T, group=GROUP,
        num_kv_heads=HEADS, num_pages=N, page_size=page_size, token_bytes=512, size=rows,
    )  # fmt: skip
    tiles = jax.eval_shape(
        cut, block_tables=tables, kv_lens=lens, cu_q_lens=ends, chosen=shape((R,), jnp.bool_)
    )
    arrays = dict(block_tables=tables, cu_q_lens=ends, layer=scalar, tiles=tiles)
    arrays |= dict(sm_scale=shape((), jnp.float32), sliding_window=scalar if window else None)
    q = shape((T, HEADS * GROUP, head_dim), dtype)

    def run(q, pages, arrays):
        return prefill_attention(q, *pages, **arrays, **options, config=chosen, card=card)

    return run, (q, pages, arrays)


def extremes(configs):
    """Of configs that differ in stages those with the fewest and the most: registers are alike."""
    alike = {}
    for one in configs:
        alike.setdefault(dataclasses.replace(one, stages=0), []).append(one)
    return [one for group in alike.values() for one in dict.fromkeys((group[0], group[-1]))]


def hoppers_own(kernel, head_dim, page_size, quantized):
    """Whether Hopper's own kernel serves this."""
    if kernel is decode:
        return not quantized or head_dim in config.QUANTIZED_HEAD_DIMS
    return not quantized or (head_dim in prefill_config.QUANTIZED_HEAD_DIMS and page_size > 8)


def grid():
    """All configs in the variant that takes most, some in others: name, `(target, kernel, ...)`."""
    kernels = [(decode, 16), (decode, 32), (decode, 64), (prefill, 32), (prefill, 64)]
    for target, (kernel, rows), head_dim, page_size, variant in itertools.product(
        EVERY, kernels, config.HEAD_DIMS, (8, 16, 128), VARIANTS
    ):
        quantized = variant in PAGES
        if page_size != 16 and variant not in ("capped", "fp8", "int8"):
            continue
        if (target, variant) == ("a100", "fp8"):
            continue
        if target == "h200" and hoppers_own(kernel, head_dim, page_size, quantized):
            continue
        card = EVERY[target]
        sizes = dict(head_dim=head_dim, page_size=page_size, quantized=quantized)
        try:
            portable.swizzle(min(page_size, 32), head_dim, by_warps=quantized or not card.tma)
        except NotImplementedError:
            continue
        most = portable.max_rows(head_dim)
        if rows > most or portable.packed_rows(1, rows, head_dim) != rows:
            continue
        if kernel is prefill and rows != most:
            continue
        if kernel is decode:
            configs = portable.decode_configs(card, rows=rows, **sizes)
        else:
            configs = portable.prefill_configs(card, **sizes)
        if (page_size, variant) != (16, "capped"):
            configs = {one.block_kv: one for one in reversed(configs)}.values()
        for one in extremes(configs):
            per_sm = getattr(one, "num_cores", None) or one.num_ctas
            name = (
                f"{target}-{kernel.__name__}{rows}-d{head_dim}-p{page_size}-{variant}"
                f"-{one.block_kv}x{one.stages}x{per_sm // card.num_sms}"
            )
            yield name, (target, kernel, rows, head_dim, page_size, one, variant)


GRID = dict(grid())


def whole_op(page_dtype=None, head_dim=128):
    """Mixed batches by the public op, with every option."""
    pages, tables, lens, scalar = given(head_dim, 16, jnp.float16, page_dtype)
    scales = dict(zip(("k_scales", "v_scales"), pages[2:], strict=False))
    arrays = scales | dict(
        q=shape((T, HEADS * GROUP, head_dim), jnp.float16), k_pages=pages[0], v_pages=pages[1],
        block_tables=tables, kv_lens=lens, cu_q_lens=shape((R + 1,), jnp.int32), layer=scalar,
        sliding_window=scalar, sinks=shape((HEADS * GROUP,), jnp.float32),
    )  # fmt: skip
    options = dict(soft_cap=50.0, implementation="mosaic_gpu")
    return lambda arrays: paged_attention(**arrays, **options), (arrays,)


OPS = {
    "whole_op": (None,), "int8_op": (jnp.int8,), "fp8_op": (jnp.float8_e4m3fn,),
    "hopper_op": (jnp.float8_e4m3fn, 256),
}  # fmt: skip
BY_DEFAULT = {  # (fp8 is not for Ampere)
    "a100": ["whole_op"], "rtx4090": ["fp8_op"], "b200": ["whole_op"],
    "rtx5090": ["int8_op"],
}  # fmt: skip


def program(name):
    """For the process that compiles: `(function, arguments)`."""
    if name in OPS:
        return whole_op(*OPS[name])
    target, kernel, *case, variant = GRID[name]
    return kernel(EVERY[target], *case, **VARIANTS[variant], page_dtype=PAGES.get(variant))


def check(card, kernel, facts, per_sm):
    """The kernel named so is to fit a multiprocessor `per_sm` times; the merging always does."""
    named = {found["name"]: found for found in facts["kernels"]}
    assert {kernel} <= set(named) <= {kernel, "merge_parts"}
    assert sum(found["spills"] for found in named.values()) == 0, named
    # A thread block is 128 threads, and takes 1 KiB more than it asks for.
    assert named[kernel]["registers"] <= min(65536 // 128 // per_sm, 255)
    shared = named[kernel]["shared"]
    assert shared > 0
    assert (shared + 1024) * per_sm <= card.shared_bytes
    assert not card.tma or named[kernel]["aligned"] >= 128


@pytest.mark.parametrize("target", CARDS)
def test_kernels_within_budget(target):
    """All three of them, as the heuristics choose, with pages of floats or quantised ones."""
    ops = BY_DEFAULT[target]
    found = gpu_compile.compile_programs("test_mosaic_gpu_portable_compile", ops, target)
    for op, facts in found.items():
        card, sizes = CARDS[target], dict(head_dim=128, page_size=16, quantized=op != "whole_op")
        per_sm = {
            "portable_decode": portable.decode_configs(card, rows=16, **sizes)[0].num_cores,
            "portable_prefill": portable.prefill_configs(card, **sizes)[0].num_ctas,
        }
        named = {kernel["name"]: kernel for kernel in facts["kernels"]}
        for name, num_ctas in per_sm.items():
            check(card, name, {"kernels": [named[name]]}, num_ctas // card.num_sms)
        assert {*per_sm} <= {*named} <= {*per_sm, "merge_parts"}
        assert sum(kernel["spills"] for kernel in named.values()) == 0
        assert facts["temp"] < N * HEADS * 16 * 128 * 2 * 2  # (no copy of the pool)


def test_hopper_is_served_what_its_own_prefill_kernel_declines():
    """Both kinds of kernel in one call."""
    name = "test_mosaic_gpu_portable_compile"
    facts = gpu_compile.compile_programs(name, ["hopper_op"], "h200")["hopper_op"]
    sizes = dict(head_dim=256, page_size=16, quantized=True)
    per_sm = portable.prefill_configs(H200, **sizes)[0].num_ctas // H200.num_sms
    (kernel,) = [found for found in facts["kernels"] if found["name"] == "portable_prefill"]
    check(H200, "portable_prefill", {"kernels": [kernel]}, per_sm)
    names = {found["name"] for found in facts["kernels"]}
    assert names == {"portable_prefill", "paged_decode", "merge_parts"}
    assert sum(found["spills"] for found in facts["kernels"]) == 0
    assert facts["temp"] < N * HEADS * 16 * 256 * 2


@pytest.mark.slow
@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("part", range(28))
def test_whatever_can_be_chosen_is_within_budget(part, target):
    names = [name for name, (its, *_) in GRID.items() if its == target][part::28]
    found = gpu_compile.compile_programs("test_mosaic_gpu_portable_compile", names, target)
    for name in names:
        _, kernel, *_, one, _ = GRID[name]
        num_ctas = one.num_cores if kernel is decode else one.num_ctas
        card = EVERY[target]
        check(card, f"portable_{kernel.__name__}", found[name], num_ctas // card.num_sms)


@pytest.mark.slow
@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("name", steps.STEPS)
def test_a_step_updates_the_pool_in_place(name, target):
    """Of a Llama-3-8B-shaped decoder."""
    facts = gpu_compile.compile_programs("test_mosaic_gpu_steps_compile", [name], target)[name]
    own = {kernel.replace("paged_", "portable_") for kernel in steps.KERNELS[name]}
    assert {kernel["name"] for kernel in facts["kernels"]} == own
    assert sum(kernel["spills"] for kernel in facts["kernels"]) == 0
    assert facts["alias"] >= 2 * steps.SHAPE["num_layers"] * steps.POOL
    assert facts["temp"] < steps.POOL
    assert "plan_batch" not in facts["looped"]
