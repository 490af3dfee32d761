"""The arithmetic of the portable kernels: a tile of packed query rows reads the pages of one row.

Without `wgmma`, and (here) without the tensor memory of data-centre Blackwell: products are those
of a warp (`mma.sync`), operands pass through registers. A thread block is one warpgroup, that
copies, waits and computes; two or more of them share a multiprocessor and fill each other's waits.

    S [Q, B] = Q [Q, D] K^T [D, B]       then       O [Q, D] += P [Q, B] V [B, D]

Q is 16, 32 or 64: one, two or four of the warps lie along it and the others along the columns (the
tokens of S, the elements of O), so that a decode tile of 16 rows keeps all four busy. Queries stay
in registers, as far as these reach. P changes from the layout of an accumulator to that of an
operand in shared memory.

Copies run `stages - 1` blocks ahead (`ring`). What may not be read: entries of the block table that
are no page (the number is clamped for the copy, its tokens are masked), and slots behind the last
token, which may hold NaN: scores there are replaced, and rows of V are zeroed in shared memory,
since 0 * NaN is NaN. Pages before a sliding window are not copied.

Blocks of quantised pages are widened in shared memory (`_widen`), K before the first product and V
before the second: numbers times scales, rounded to the queries' dtype. What follows finds what
pages of that dtype would hold.

Pallas' interpreter runs all of it but the product, which is `jnp.dot` there, and `cp.async`, which
is a plain copy; layouts, registers and shared memory are seen by compiling for each kind of card.
jax 0.10 has neither the product nor copies before Hopper.

Letters: Q rows of the tile, D head_dim, B `block_kv`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from paxattn.attention.mosaic_gpu.common import (
    LOG2E,
    LOWEST,
    across,
    capped,
    load,
    store,
    widen_rows,
)
from paxattn.attention.mosaic_gpu.portable.ring import (
    Job,
    Pools,
    Ring,
    Tile,
    await_keys,
    await_values,
    fetch,
    fetch_first,
    page_numbers,
    page_scales,
)

plgpu: Any = mosaic_gpu  # (jax 0.10, which mypy may see, does not have all of it)


def rows_layout(warps: int) -> Any:
    """The layout of an accumulator; its `reduce(1)` has a number per row."""
    return plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=warps)


def _left(t: Tile) -> Any:
    return plgpu.Layout.MMA_LHS(t.dtype, m_warps=t.warps)


def _right(t: Tile) -> Any:
    return plgpu.Layout.MMA_RHS(t.dtype, m_warps=t.warps)


def _filled(t: Tile, value: float, *shape: int) -> jax.Array:
    layout = rows_layout(t.warps)
    layout = layout if len(shape) == 2 else layout.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _mma(t: Tile, acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`acc + a @ b`."""
    if t.interpret:
        return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
    return plgpu.mma(acc, a, b)


def _parts(t: Tile) -> range:
    """First columns of the parts of a head that are read at a time."""
    return range(0, t.head_dim, t.columns)


def _part(t: Tile, ref: Any, column: int) -> Any:
    return ref.at[:, pl.ds(column, t.columns)]


def _widen(t: Tile, ring: Ring, numbers: Any, scales: tuple[jax.Array, ...]) -> Any:
    """A block of K or V in 16 bits: of quantised pages widened page by page, else as it is."""
    if t.page_dtype is None:
        return numbers
    for i, factors in enumerate(scales):
        rows = pl.ds(i * t.copy, t.copy)
        widen_rows(numbers.at[rows], factors, ring.wide.at[rows], t.widening)
    return ring.wide


def _seen(t: Tile, pools: Pools, job: Job, first: jax.Array) -> jax.Array:
    """Which tokens of a block, whose first is token `first`, each row of the tile sees."""
    layout, shape = rows_layout(t.warps), (t.rows, t.block_kv)
    token = first + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    seen = token < job.stored
    if t.causal:
        row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=layout.reduce(1))
        packed = row + job.first_packed
        position = job.history + lax.div(packed, jnp.full_like(packed, t.group))
        seen &= token <= across(position, shape, 0)
        if t.window:
            seen &= token > across(position - pools.window, shape, 0)
    return seen


def _clear_past(t: Tile, v: Any, left: jax.Array) -> None:
    """Zeroes the rows of a block of V from `left` on: they are nobody's, and may be NaN."""

    @pl.when(left < t.block_kv)
    def _() -> None:
        shape, layout = (t.block_kv, t.columns), rows_layout(2)  # (which fits all such shapes)
        keep = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) < left
        for column in _parts(t):
            part = _part(t, v, column)
            old = load(part, layout)
            store(part, jnp.where(keep, old, jnp.zeros_like(old)))


def _fold(
    t: Tile,
    pools: Pools,
    ring: Ring,
    job: Job,
    queries: Callable[[int], jax.Array],
    edge: bool,
    step: jax.Array,
    carry: tuple,
) -> tuple:
    """Folds one block into the running sums; with `edge` it may hold what some row does not see."""
    numbers, scales, acc, top, total = carry
    slot, blocks = lax.rem(step, jnp.int32(t.stages)), job.walk.blocks
    first = job.walk.start + job.walk.block(step) * t.block_kv
    ahead = page_numbers(t, pools, job, step + t.stages)
    scales_ahead = page_scales(t, pools, job, step + 1) if t.scales_ahead else ()
    scales = scales if t.scales_ahead else page_scales(t, pools, job, step)
    await_keys(t, ring, step, blocks)
    fetch(t, pools, ring, job, step + (t.stages - 1), numbers)

    keys = _widen(t, ring, ring.k.at[slot], scales[: t.copies])
    scores = _filled(t, 0.0, t.rows, t.block_kv)
    for column in _parts(t):
        k = _part(t, keys, column).transpose((1, 0))
        scores = _mma(t, scores, queries(column), load(k, _right(t)))
    scores = scores * pools.scale
    if t.soft_cap is not None:
        scores = capped(scores, t.soft_cap) * LOG2E
    if edge:
        scores = jnp.where(_seen(t, pools, job, first), scores, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(axis=1))
    fade = jnp.exp2(top - new_top)
    p = jnp.exp2(scores - across(new_top, scores.shape, 0))
    if t.lazy:
        total = total * across(fade, total.shape, 0) + p
    else:
        total = total * fade + p.sum(axis=1)
    store(ring.p, p.astype(t.dtype))
    acc = tuple(a * across(fade, a.shape, 0) for a in acc)

    await_values(t, ring, step, blocks)
    values = _widen(t, ring, ring.v.at[slot], scales[t.copies :])
    if edge:
        _clear_past(t, values, job.stored - first)
    p = load(ring.p, _left(t))
    acc = tuple(
        _mma(t, a, p, load(_part(t, values, column), _right(t)))
        for a, column in zip(acc, _parts(t), strict=True)
    )
    return ahead, scales_ahead, acc, new_top, total


def attend(
    t: Tile, pools: Pools, ring: Ring, job: Job, q: Any
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Attends to all blocks of a job.

    Args:
        t: static.
        pools: in global memory.
        ring: in shared memory; nothing is under way to it, before and after.
        job: what to do.
        q: reference to the queries in global memory, [Q, D].

    Returns:
        O f32[Q, D] in parts of columns, the softmax's sum f32[Q], which O is yet to be divided by,
        and the maximum f32[Q] that both are relative to, in base 2; `LOWEST` where nothing is seen.
    """
    numbers = fetch_first(t, pools, ring, job)

    def queries(column: int) -> jax.Array:
        return load(_part(t, q, column), _left(t))

    kept = {column: queries(column) for column in _parts(t)} if t.keeps_queries else {}
    carry = (
        numbers,
        page_scales(t, pools, job, jnp.int32(0)) if t.scales_ahead else (),
        tuple(_filled(t, 0.0, t.rows, t.columns) for _ in _parts(t)),
        _filled(t, LOWEST, t.rows),
        _filled(t, 0.0, t.rows, t.block_kv) if t.lazy else _filled(t, 0.0, t.rows),
    )
    fold = functools.partial(_fold, t, pools, ring, job, kept.__getitem__ if kept else queries)
    walk = job.walk
    carry = lax.fori_loop(0, walk.num_plain, functools.partial(fold, False), carry)
    _, _, acc, top, total = lax.fori_loop(
        walk.num_plain, walk.blocks, functools.partial(fold, True), carry
    )
    return acc, total.sum(axis=1) if t.lazy else total, top


def write(
    t: Tile, o: Any, lse: Any, acc: tuple[jax.Array, ...], total: jax.Array, top: jax.Array
) -> None:
    """Divides by the sum, and writes o [Q, D] and lse f32[Q], in base 2, to references."""
    nothing = total == 0.0
    total = jnp.where(nothing, 1.0, total)
    scale = 1.0 / total
    for a, column in zip(acc, _parts(t), strict=True):
        store(_part(t, o, column), (a * across(scale, a.shape, 0)).astype(o.dtype))
    store(lse, jnp.where(nothing, LOWEST, top + jnp.log2(total)))
