"""The decode kernel for Hopper: a tile of up to 64 packed query rows per KV head reads paged KV.

Letters: R rows (sequences), H KV heads, Q packed query rows (new tokens x group, token-major,
padded to a multiple of 8), D head_dim, V columns of a value (D rounded up to 64), L layers, N
pages, P `page_size`, B `block_kv` tokens, S slots for partial results.

Products are swapped. The tensor cores multiply 64 rows at a time, and a decode step has one to 16
queries per KV head: so tokens take the place of rows,

    S^T [B, Q] = K [B, D] Q^T [D, Q]       then       O^T [V, Q] += V^T [V, B] P^T [B, Q]

which wastes nothing, and keeps the accumulator small (V x Q numbers over 128 threads: two thread
blocks fit a multiprocessor). The softmax runs over the rows of S^T, so its maximum crosses warps
(once per block); sums stay per thread until the end of an item. P must change from the layout of an
accumulator to that of an operand, and passes through shared memory.

The grid is persistent: `num_cores` thread blocks, each with its own list of items from
`schedule_decode`: a run of blocks of one (row, KV head). A thread block has two warpgroups:

* the *producer*, a single warp: per item one copy of the query tile, per block one TMA copy for
  each page of K and of V (a page of one head is a contiguous [P, D] tile of the stacked pool,
  `k_pages[layer, page, head]`; of a page larger than a block, a part), into rings of `stages`
  blocks. It runs ahead of the consumer, also into the next items. Page numbers are loaded a block
  ahead, items an item ahead.
* the *consumer*: four warps for the arithmetic.

Barriers, one per place in a ring: `*_full` is completed by the copies (a block has an arrival per
page), `*_free` by the consumer once its product has read the place. The producer waits for a place
to be free from the second time round, and for the last frees before it leaves.

What may not be read: entries of the block table that are no page (the number is clamped for the
copy, its tokens are masked), and slots behind the last token, which may hold NaN: scores there are
replaced, and rows of V are zeroed, since 0 * NaN is NaN (only in blocks that are not full). Pages
before a sliding window are not copied.

The accumulator goes from registers to global memory as it is, [V, Q]: whole sectors are written,
and nothing is staged. A unit in one piece gives its final result; a piece of one gives f32 partial
results, o normalised, to be merged (`merge.py`). The log-sum-exp is in base 2 here, and about
`LOWEST` where nothing was seen.

Quantised pages (fp8, int8) come with a scale for each token: those of K and of V follow a page of K
by copies of their own into rings of scales, and arrive at its barrier. Numbers are widened in
registers to what the hardware converts them to (fp8 to f16, int8 to bf16, both without rounding): K
goes to its product from there (of a large head_dim as V does: registers end), V through a 16-bit
block in shared memory, since an operand that is transposed must lie there; its place in the ring is
then free at once. A key's scale multiplies its
row of S^T, a value's its row of P^T. So that P^T keeps to [0, 1] (f16 has few exponents), what is
subtracted from scores is the maximum of `score + log2(scale of V)` there.

The interpreter checks the numbers, the barriers and races, but sees neither layouts, nor
alignment, nor that `wgmma` is asynchronous, nor a missing `commit_smem`; the compile tests see
the former two; only a GPU sees the rest.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from paxattn.attention import schedule as plan
from paxattn.attention.mosaic_gpu.common import (
    LOG2E,
    LOWEST,
    across,
    capped,
    fetch,
    load,
    load_scales,
    store,
    widen,
)
from paxattn.attention.mosaic_gpu.decode_refs import (
    QUERY_TILES,
    Inputs,
    Outputs,
    Scratch,
    Tile,
)

_WGMMA = plgpu.Layout.WGMMA
_COLUMNS = _WGMMA.reduce(0)  # one number per column of such an array
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


class _Item(NamedTuple):
    """A line of the schedule, as scalars."""

    row: jax.Array
    head: jax.Array
    token: jax.Array
    blocks: jax.Array
    slot: jax.Array
    kv_len: jax.Array
    q_len: jax.Array


def _load_item(items: Any, i: jax.Array) -> _Item:
    i = jnp.minimum(i, items.shape[0] - 1)  # the one after the last is loaded, but not used
    return _Item(*(items[i, column] for column in range(plan.COLUMNS)))


def _page_numbers(tables: Any, item: _Item, block: jax.Array, t: Tile) -> tuple[jax.Array, ...]:
    """A block's page numbers; past the row's last page that page again (it is in the cache)."""
    last = jnp.minimum(lax.div(item.kv_len - 1, jnp.int32(t.page_size)), t.max_pages - 1)
    first = lax.div(item.token + block * t.config.block_kv, jnp.int32(t.page_size))
    return tuple(tables[item.row, jnp.minimum(first + i, last)] for i in range(t.pages))


def produce(x: Inputs, s: Scratch, first: jax.Array, last: jax.Array, t: Tile) -> None:
    """What the producer warp does with items `first` to `last`: see the top of this file."""
    stages = jnp.int32(t.config.stages)
    layer = x.numbers[0]

    def one_item(i: jax.Array, carry: tuple) -> tuple:
        place, item = carry
        following = _load_item(x.items, i + 1)
        tile = lax.rem(i - first, jnp.int32(QUERY_TILES))

        @pl.when(i - first >= QUERY_TILES)
        def _() -> None:
            plgpu.barrier_wait(s.q_free.at[tile])

        plgpu.copy_gmem_to_smem(x.q.at[item.row, item.head], s.q.at[tile], s.q_full.at[tile])

        def one_block(block: jax.Array, carry: tuple) -> tuple:
            place, numbers = carry
            at = lax.rem(place, stages)
            ahead = _page_numbers(x.block_tables, item, block + 1, t)
            size = min(t.page_size, t.config.block_kv)
            part = lax.div(item.token, jnp.int32(size)) + block  # (of a page of several blocks)
            part = lax.rem(part, jnp.int32(t.page_size // size)) * size
            inside = pl.ds(0 if size == t.page_size else part, size)

            def copy(free: Any, full: Any, *pools: tuple[Any, Any]) -> None:
                pl.when(place >= stages)(lambda: plgpu.barrier_wait(free.at[at]))
                for p, number in enumerate(numbers):
                    page = jnp.clip(number, 0, t.num_pages - 1)
                    for pool, ring in pools:
                        source = pool.at[layer, page, item.head, inside]
                        to = ring.at[at, pl.ds(p * size, size)]
                        fetch(source, to, full.at[at])

            scales = [(x.k_scales, s.k_scales), (x.v_scales, s.v_scales)]
            copy(s.k_free, s.k_full, (x.k_pages, s.k), *scales[: t.num_scales])
            copy(s.v_free, s.v_full, (x.v_pages, s.v))
            return place + 1, ahead

        numbers = _page_numbers(x.block_tables, item, jnp.int32(0), t)
        place, _ = lax.fori_loop(0, item.blocks, one_block, (place, numbers))
        return place, following

    place, _ = lax.fori_loop(first, last, one_item, (jnp.int32(0), _load_item(x.items, first)))

    @pl.loop(jnp.maximum(place - stages, 0), place)
    def drain_blocks(i: jax.Array) -> None:
        plgpu.barrier_wait(s.k_free.at[lax.rem(i, stages)])
        plgpu.barrier_wait(s.v_free.at[lax.rem(i, stages)])

    @pl.loop(jnp.maximum(last - QUERY_TILES, first), last)
    def drain_tiles(i: jax.Array) -> None:
        plgpu.barrier_wait(s.q_free.at[lax.rem(i - first, jnp.int32(QUERY_TILES))])


def _stored(token: jax.Array, offset: jax.Array, item: _Item, pages: jax.Array, t: Tile) -> Any:
    """Whether a token is the row's: before its end, and in a page (`pages` has a bit for each)."""
    page = lax.shift_right_logical(pages, lax.div(offset, jnp.int32(t.page_size)))
    return (token < item.kv_len) & ((page & 1) == 1)


def _is_page(numbers: tuple[jax.Array, ...], t: Tile) -> jax.Array:
    """Bit `i` tells whether number `i` is that of a page."""
    bits = jnp.int32(0)
    for i, number in enumerate(numbers):
        bits += ((number >= 0) & (number < t.num_pages)).astype(jnp.int32) << i
    return bits


def _seen(first: jax.Array, item: _Item, pages: jax.Array, window: jax.Array, t: Tile) -> Any:
    """What is seen, bool[B, Q], of a block that begins with token `first`."""
    shape = (t.config.block_kv, t.rows)
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=_WGMMA)
    offset = iota(0)
    token = first + offset
    position = item.kv_len - item.q_len
    if not t.single:
        position += lax.div(iota(1), jnp.int32(t.group))
    seen = _stored(token, offset, item, pages, t) & (token > position - window)
    if t.causal and not t.single:
        seen &= token <= position
    return seen


def _clear_unstored(v: Any, first: jax.Array, item: _Item, pages: jax.Array, t: Tile) -> None:
    """Zeroes what is not the row's in a block of V, if there is any: it may be NaN."""
    size = t.config.block_kv
    all_pages = (1 << t.pages) - 1

    @pl.when((first + size > item.kv_len) | (pages != all_pages))
    def _() -> None:
        offset = plgpu.broadcasted_iota(jnp.int32, (size, 64), 0, layout=_WGMMA)
        keep = _stored(first + offset, offset, item, pages, t)
        for column in t.columns:
            part = v.at[:, pl.ds(column, 64)]
            old = load(part, _WGMMA)
            store(part, jnp.where(keep, old, jnp.zeros_like(old)))
        plgpu.commit_smem()


def consume(
    x: Inputs, out: Outputs, s: Scratch, first: jax.Array, last: jax.Array, t: Tile
) -> None:
    """What the consumer warpgroup does with them."""
    stages, block_kv = jnp.int32(t.config.stages), t.config.block_kv
    scale, window = x.scale[0], x.numbers[1]

    def one_item(i: jax.Array, carry: tuple) -> tuple:
        place, item = carry
        following = _load_item(x.items, i + 1)
        tile = lax.rem(i - first, jnp.int32(QUERY_TILES))
        plgpu.barrier_wait(s.q_full.at[tile])

        def one_block(block: jax.Array, carry: tuple) -> tuple:
            place, numbers, top, total, acc = carry
            at = lax.rem(place, stages)
            ahead = _page_numbers(x.block_tables, item, block + 1, t)
            pages = _is_page(numbers, t)
            token = item.token + block * block_kv

            plgpu.barrier_wait(s.k_full.at[at])
            scores = _q_dot_k(s, at, tile, t)
            v_scales = None
            if t.page_dtype is not None:
                v_scales = load_scales(s.v_scales.at[at])
                plgpu.commit_smem()  # these reads come before TMA's next writes: another proxy
            plgpu.barrier_arrive(s.k_free.at[at])
            scores = _scaled(scores, scale, t)
            seen = _seen(token, item, pages, window, t)
            scores = jnp.where(seen, scores, -jnp.inf)
            weighted = scores if v_scales is None else _weighted(scores, seen, v_scales)
            new_top = jnp.maximum(top, weighted.max(axis=0))
            decay = jnp.exp2(top - new_top)
            p = jnp.exp2(scores - across(new_top, scores.shape, 1))
            if t.lazy:
                total = total * across(decay, total.shape, 1) + p
            else:
                total = total * decay + p.sum(axis=0)
            acc = tuple(a * across(decay, a.shape, 1) for a in acc)
            if v_scales is not None:
                p = jnp.where(seen, p * across(v_scales, p.shape, 0), 0.0)
            store(s.p.transpose((1, 0)), plgpu.layout_cast(p.astype(t.dtype), _TRANSPOSED))
            plgpu.commit_smem()

            plgpu.barrier_wait(s.v_full.at[at])
            v = s.v.at[at]
            if t.page_dtype is not None:
                v = _widened(s, v, t)
                plgpu.barrier_arrive(s.v_free.at[at])
            _clear_unstored(v, token, item, pages, t)

            def p_dot_v(product: Any, columns: tuple[int, int]) -> jax.Array:
                part = v.at[:, pl.ds(*columns)]
                plgpu.wgmma(product, part.transpose((1, 0)), s.p.transpose((1, 0)))
                return product[...]

            # Fresh accumulators each time: the interpreter has no other.
            acc = tuple(
                a
                + pl.run_scoped(
                    functools.partial(p_dot_v, columns=columns),
                    plgpu.ACC((columns[1], t.rows), jnp.float32),
                )
                for a, columns in zip(acc, t.chunks, strict=True)
            )
            if t.page_dtype is None:
                plgpu.barrier_arrive(s.v_free.at[at])
            return place + 1, ahead, new_top, total, acc

        numbers = _page_numbers(x.block_tables, item, jnp.int32(0), t)
        start = (
            place,
            numbers,
            plgpu.layout_cast(jnp.full((t.rows,), LOWEST, jnp.float32), _COLUMNS),
            plgpu.layout_cast(jnp.zeros((block_kv, t.rows), jnp.float32), _WGMMA)
            if t.lazy
            else plgpu.layout_cast(jnp.zeros((t.rows,), jnp.float32), _COLUMNS),
            tuple(
                plgpu.layout_cast(jnp.zeros((size, t.rows), jnp.float32), _WGMMA)
                for _, size in t.chunks
            ),
        )
        place, _, top, total, acc = lax.fori_loop(0, item.blocks, one_block, start)
        plgpu.barrier_arrive(s.q_free.at[tile])
        _finish(out, item, top, total.sum(axis=0) if t.lazy else total, acc)
        return place, following

    lax.fori_loop(first, last, one_item, (jnp.int32(0), _load_item(x.items, first)))


def _q_dot_k(s: Scratch, at: jax.Array, tile: jax.Array, t: Tile) -> jax.Array:
    """Scores [B, Q] of a block, of quantised pages with the scales of K."""

    def product(scores: Any, k: Any, columns: Any = slice(None)) -> jax.Array:
        plgpu.wgmma(scores, k, s.q.at[tile, :, columns].transpose((1, 0)))
        return scores[...]

    def times(k: Any, *columns: Any) -> jax.Array:
        acc = plgpu.ACC((t.config.block_kv, t.rows), jnp.float32)
        return pl.run_scoped(lambda scores: product(scores, k, *columns), acc)

    if t.page_dtype is None:
        return times(s.k.at[at])
    if t.staged:
        scores = times(_widened(s, s.k.at[at], t))
    else:  # (all columns at once would take too many registers)
        parts = (pl.ds(column, 64) for column in t.columns)
        scores = functools.reduce(
            jnp.add, (times(widen(s.k.at[at, :, part], t.dtype), part) for part in parts)
        )
    return scores * across(load_scales(s.k_scales.at[at]), scores.shape, 0)


def _widened(s: Scratch, numbers: Any, t: Tile) -> Any:
    """A block of K or V in 16 bits, in the one place for that."""
    for column in t.columns:  # (all at once would take too many registers)
        part = pl.ds(column, 64)
        store(s.wide.at[:, part], widen(numbers.at[:, part], t.dtype))
    plgpu.commit_smem()  # what was written, for `wgmma`; and what was read, before it is refilled
    return s.wide


def _weighted(scores: jax.Array, seen: jax.Array, v_scales: jax.Array) -> jax.Array:
    """Scores and the logarithm of the scales [B] of V, for a maximum that bounds their product.

    The scale of a token without a value is next to nothing: bounded, or sums might overflow.
    """
    log = jnp.log2(jnp.maximum(v_scales, 2.0**-64))
    return jnp.where(seen, scores + across(log, scores.shape, 0), -jnp.inf)


def _scaled(scores: jax.Array, scale: jax.Array, t: Tile) -> jax.Array:
    """Scores in base 2, capped if asked for."""
    if t.soft_cap is None:
        return scores * scale
    return capped(scores * (scale * (1.0 / LOG2E)), t.soft_cap) * LOG2E


def _finish(out: Outputs, item: _Item, top: jax.Array, total: jax.Array, acc: tuple) -> None:
    """Writes an item's result, [V, Q], where it belongs."""
    nothing = total == 0.0
    total = jnp.where(nothing, 1.0, total)
    lse = jnp.where(nothing, LOWEST, top + jnp.log2(total))

    def write(o_ref: Any, lse_ref: Any) -> None:
        begin = 0
        for a in acc:
            o = (a * across(1.0 / total, a.shape, 1)).astype(o_ref.dtype)
            store(o_ref.at[pl.ds(begin, a.shape[0])], o)
            begin += a.shape[0]
        store(lse_ref, lse)

    @pl.when(item.slot < 0)
    def _() -> None:
        write(out.o.at[item.row, item.head], out.lse.at[item.row, item.head])

    @pl.when(item.slot >= 0)
    def _() -> None:
        write(out.o_parts.at[item.slot], out.lse_parts.at[item.slot])
