"""The body of the prefill kernel for Hopper.

In the form of FlashAttention-3 (Shah et al., 2024), with the pipeline of JAX's own dense kernel
(`jax.experimental.pallas.ops.gpu.attention_mgpu`). A tile (see `prefill_tiles`) is 128 packed query
rows of one KV head. A CTA has three warpgroups:

    producer (one warp)       for each block of a tile's KV: one TMA copy per page into a ring of
                              stages, keys and values on their own barriers
    two consumers, 64 rows    S = Q K^T (wgmma, both from SMEM), online softmax in registers,
                              O += P V (wgmma, P from registers), one block after the other

    barrier   arrivals              says
    q         1 copy                a consumer's queries are in SMEM (one barrier per consumer)
    k, v      1 per page of a block the block in this stage is there
    k_free,   both consumers        nobody reads this stage's block any more
    v_free
    turn      both consumers        the consumers move in step, half a block apart: while one is in
                                    its softmax the tensor cores are the other's ("ping-pong")

Blocks that every query of the tile sees whole are walked first, by a loop without masks; then
those on the edges (the causal diagonal, the window's lower end, the sequence's end). The order is
free, since the softmax is online; producer and consumers derive it from the same `Walk`. Blocks
beyond the tile's last query are not read, nor pages before the window's reach.

What a page's unowned slots hold is anybody's, NaN included. Scores there are masked by selection.
A weight of 0 does not mend a value of NaN, so in the block where the sequence ends the first
consumer clears the value rows past it in SMEM; the second reads them half a block later, behind
two phases of `turn`.

Quantised pages are read by a fourth warpgroup, the *widener* (`prefill_load`): the consumers find
what pages of the queries' dtype would hold, and nothing else changes for them.

Where shared memory allows (`Config.own_output`), a consumer asks for the next item's queries as
soon as the last block has been folded, so that they arrive during the epilogue.

Checked in Pallas' interpreter (numbers, barriers, races) and by compiling for an H200 (layouts,
registers, spills, SMEM). The interpreter does not see layouts, whether wgmma has finished, or a
missing `commit_smem`. It has no wgmma with an operand or an accumulator that lives on in
registers either: `_add_product` has another form there.

Letters: L layers, N pages, P `page_size`, D head_dim, Hkv KV heads, G group, R rows, M
`max_pages_per_seq`, S `block_kv`, B tiles.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from paxattn.attention.mosaic_gpu.common import (
    LN2,
    LOG2E,
    LOWEST,
    across,
    capped,
    load,
    store,
)
from paxattn.attention.mosaic_gpu.prefill_load import CONSUMERS, ROWS, Scratch, produce, widen
from paxattn.attention.mosaic_gpu.prefill_tiles import Tile
from paxattn.attention.mosaic_gpu.prefill_work import (
    Item,
    Refs,
    Static,
    Walk,
    item_at,
    num_items,
    queries_at,
    walk_of,
)

_WGMMA = plgpu.Layout.WGMMA
_i32 = jnp.int32


class _Bounds(NamedTuple):
    """What a consumer's packed rows see, i32[64] (a scalar for what is the same for all)."""

    lowest: Any  # first position; None without a window
    highest: Any  # last position


def _bounds(s: Static, tile: Tile, window: jax.Array) -> _Bounds:
    if not s.causal:
        return _Bounds(None, tile.stored - 1)
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=_WGMMA.reduce(1))
    packed = row + (tile.first_packed + lax.axis_index("wg") * ROWS)
    position = lax.div(packed, jnp.full_like(packed, s.group)) + tile.history
    lowest = position - (window - 1) if s.window else None
    return _Bounds(lowest, jnp.minimum(position, tile.stored - 1))


def _masked(scores: jax.Array, bounds: _Bounds, first: jax.Array) -> jax.Array:
    """Scores of tokens that a row does not see become -inf; `first` is the block's first token."""
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=_WGMMA)
    last = bounds.highest - first
    seen = column <= (across(last, scores.shape, 0) if last.ndim else last)
    if bounds.lowest is not None:
        seen = seen & (column >= across(bounds.lowest - first, scores.shape, 0))
    return jnp.where(seen, scores, -jnp.inf)


def _clear_past(v: Any, left: jax.Array) -> None:
    """Zeroes a block's value rows from number `left` on, in SMEM, a few registers at a time."""
    columns = math.gcd(v.shape[1], 64)
    row = plgpu.broadcasted_iota(jnp.int32, (64, columns), 0, layout=_WGMMA)
    for top, at in itertools.product(range(0, v.shape[0], 64), range(0, v.shape[1], columns)):
        part = v.at[pl.ds(top, 64), pl.ds(at, columns)]
        values = load(part, _WGMMA)
        store(part, jnp.where(row < left - top, values, jnp.zeros_like(values)))
    plgpu.commit_smem()


def _add_product(
    s: Static, acc: jax.Array, p: jax.Array, p_smem: Any, v: Any, meanwhile: Callable[[], None]
) -> jax.Array:
    """`acc + p @ v`, and something to do while the tensor cores are at it."""
    if s.interpret:
        store(p_smem, p)
        plgpu.commit_smem()

        def fresh(ref: Any) -> jax.Array:
            plgpu.wgmma(ref, p_smem, v)
            return ref[...]

        meanwhile()
        return acc + pl.run_scoped(fresh, plgpu.ACC((ROWS, s.head_dim), jnp.float32))

    def more(ref: Any) -> None:
        plgpu.wgmma(ref, p, v)
        meanwhile()

    return pl.run_state(more)(plgpu.ACC.init(acc))


def _take_turn(smem: Scratch) -> None:
    plgpu.barrier_arrive(smem.turn)
    plgpu.barrier_wait(smem.turn)


def _fold(
    s: Static,
    smem: Scratch,
    scale: jax.Array,
    tile: Tile,
    walk: Walk,
    bounds: _Bounds,
    edge: bool,
    step: jax.Array,
    carry: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Folds one block into a consumer's running sums.

    Args:
        s: static.
        smem: SMEM.
        scale: of scores.
        tile: the tile.
        walk: its blocks.
        bounds: what its rows see.
        edge: whether the block may hold what some row does not see.
        step: of the walk.
        carry: blocks folded by this CTA so far; O f32[64, D] and the softmax's sum f32[64], both
            relative to the maximum f32[64], which is in units of log2(e).

    Returns:
        The new carry.
    """
    folded, acc, top, total = carry
    wg, block = lax.axis_index("wg"), s.config.block_kv
    ring, slot = smem.ring, lax.rem(folded, _i32(s.config.places))
    first = walk.start + walk.block(step) * block

    def q_k(ref: Any) -> jax.Array:
        plgpu.wgmma(ref, smem.q.at[wg], ring.k.at[slot].transpose((1, 0)))
        _take_turn(smem)
        return ref[...]

    scores = pl.run_scoped(q_k, plgpu.ACC((ROWS, block), jnp.float32))
    plgpu.barrier_arrive(ring.k_free.at[slot])
    if s.soft_cap is not None:
        scores, scale = capped(scores * scale, s.soft_cap), jnp.float32(LOG2E)
    if edge:
        scores = _masked(scores, bounds, first)
    new_top = jnp.maximum(top, scores.max(axis=1) * scale)
    fade = jnp.exp2(top - new_top)
    p = jnp.exp2(scores * scale - across(new_top, scores.shape, 0))
    acc = acc * across(fade, acc.shape, 0)
    total = total * fade + p.sum(axis=1)
    # The whole softmax is to happen on this side of the barrier.
    acc, total, top, p = lax.optimization_barrier((acc, total, new_top, p.astype(s.dtype)))
    plgpu.barrier_arrive(smem.turn)
    plgpu.barrier_wait(ring.v_there.at[slot])
    plgpu.barrier_wait(smem.turn)
    if edge:
        left = tile.stored - first
        pl.when((wg == 0) & (left < block))(lambda: _clear_past(ring.v.at[slot], left))

    def await_next_keys() -> None:
        @pl.when(step + 1 < walk.blocks)
        def _() -> None:
            plgpu.barrier_wait(ring.k_there.at[lax.rem(folded + 1, _i32(s.config.places))])

    p_smem = smem.p.at[wg] if s.interpret else None
    acc = _add_product(s, acc, p, p_smem, ring.v.at[slot], await_next_keys)
    plgpu.barrier_arrive(ring.v_free.at[slot])
    return folded + 1, acc, top, total


def _consume(s: Static, refs: Refs, smem: Scratch) -> None:
    """A consumer warpgroup: 64 rows of every item."""
    wg, window, scale = lax.axis_index("wg"), refs.numbers[3], refs.scale[0]
    q, lse_out = smem.q.at[wg], smem.lse.at[wg]
    o_out = q if smem.o is None else smem.o.at[wg]

    rows = pl.ds(wg * ROWS, ROWS)

    def fetch_queries(item: Item) -> None:
        place = *queries_at(refs, item), rows
        plgpu.copy_gmem_to_smem(refs.q.at[place], q, smem.q_there.at[wg])

    def work(nth: jax.Array, carry: tuple[jax.Array, Item]) -> tuple[jax.Array, Item]:
        folded, item = carry
        early = smem.o is not None
        ahead = item_at(s, refs, nth + 1) if early else item  # (where registers are not so scarce)
        walk, bounds = walk_of(s, item.tile, window), _bounds(s, item.tile, window)
        vector = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x), _WGMMA.reduce(1))  # noqa: E731
        acc = plgpu.layout_cast(jnp.zeros((ROWS, s.head_dim), jnp.float32), _WGMMA)
        sums = folded, acc, vector(jnp.float32(LOWEST)), vector(jnp.float32(0))
        plgpu.barrier_wait(smem.q_there.at[wg])

        @pl.when(walk.blocks > 0)
        def _() -> None:
            plgpu.barrier_wait(smem.ring.k_there.at[lax.rem(folded, _i32(s.config.places))])

        pl.when(wg == 1)(lambda: _take_turn(smem))
        fold = functools.partial(_fold, s, smem, scale, item.tile, walk, bounds)
        sums = lax.fori_loop(0, walk.num_plain, functools.partial(fold, False), sums)
        sums = lax.fori_loop(walk.num_plain, walk.blocks, functools.partial(fold, True), sums)
        folded, acc, top, total = sums
        pl.when(wg == 0)(lambda: _take_turn(smem))

        if early:
            fetch_queries(ahead)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        nothing = total == 0.0
        acc = acc * across(1.0 / jnp.where(nothing, 1.0, total), acc.shape, 0)
        store(o_out, acc.astype(s.dtype))
        store(lse_out, jnp.where(nothing, -jnp.inf, top * LN2 + jnp.log(total)))
        plgpu.commit_smem()
        place = item.head, item.tile.place, rows
        plgpu.copy_smem_to_gmem(o_out, refs.o.at[place])
        plgpu.copy_smem_to_gmem(lse_out, refs.lse.at[place])
        if not early:
            ahead = item_at(s, refs, nth + 1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            fetch_queries(ahead)
        return folded, ahead

    first = item_at(s, refs, _i32(0))
    fetch_queries(first)
    lax.fori_loop(0, num_items(s, refs), work, (_i32(0), first))
    plgpu.barrier_wait(smem.q_there.at[wg])  # one more than there are items
    plgpu.wait_smem_to_gmem(0)


def warpgroups(s: Static) -> int:
    """How many warpgroups a CTA has."""
    return CONSUMERS + (2 if s.scales else 1)


def kernel(s: Static) -> Callable[..., None]:
    """Makes the kernel.

    Args:
        s: static.

    Returns:
        The warpgroups of a CTA: a function of the fields of `Refs` and, by name, `Scratch`.
    """

    def paged_prefill(*refs: Any, **smem: Any) -> None:
        cta, wg, (most, least, *more) = lax.axis_index("cta"), lax.axis_index("wg"), s.registers

        @pl.when(wg == CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(least, action="decrease")

            @plgpu.warp_map
            def _(warp: jax.Array) -> None:
                pl.when(warp == 0)(lambda: produce(s, Refs.of(cta, *refs), Scratch(**smem)))

        if s.scales:

            @pl.when(wg == CONSUMERS + 1)
            def _() -> None:
                plgpu.set_max_registers(*more, action="decrease")
                widen(s, Refs.of(cta, *refs), Scratch(**smem))

        @pl.when(wg < CONSUMERS)
        def _consumer() -> None:
            plgpu.set_max_registers(most, action="increase")
            _consume(s, Refs.of(cta, *refs), Scratch(**smem))

    return paged_prefill
