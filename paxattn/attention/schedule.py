"""How a ragged batch is cut into work items of equal cost for the cores of a device.

A *unit* is what one (row, KV head) needs from the cache: a run of blocks of `block_kv` tokens. The
units of a batch can differ by a factor of a million, so they are laid end to end on one line, a
unit costing its blocks and one more (starting and ending an item takes about as long as a block),
and the line is cut into as many equal buckets as there are cores. A core's items are what lies in
its bucket: perhaps the end of a unit, some whole ones, and the beginning of another. The number of
items therefore has a static bound, units plus cores, whatever the lengths are; only units that a
cut went through leave *partial* results, at most two per core, to be merged by log-sum-exp. (Equal
buckets of a flat list: FlashMLA's tile scheduler and, for matrix products, Stream-K, Osama et al.,
2023.) Every step is elementwise or a small reduction: no sort and no loop.

With `split`, units are cut at multiples of `split` blocks instead, and a core takes the items that
begin in its bucket. A row's sums are then taken in an order that depends on that row alone, which
makes its result independent of the batch, bit for bit; it costs balance (within one item) and room
for the partial results of the longest row that the block table allows, in every row.

The schedule depends on lengths only, so one serves all layers of a step that share a window.

Letters: R rows, H KV heads, C cores, W items, S slots for partial results, P `page_size`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

# Columns of `Schedule.items`.
ROW, HEAD, TOKEN, BLOCKS, SLOT, KV_LEN, Q_LEN, COLUMNS = range(8)

_OVERHEAD = 1  # cost of an item beside its blocks, in blocks
_SMALLEST = 3  # no bucket is smaller: a piece should not cost more to merge than to compute


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Who does what.

    Attributes:
        items: i32[W, COLUMNS], in the order of their cores. ROW and HEAD say whose cache is read,
            from its token TOKEN on, for BLOCKS blocks (possibly 0); SLOT is where the partial
            result goes, -1 for an item that is all of its unit. KV_LEN and Q_LEN are the row's
            (repeated here so that a core needs one look-up). Items past the last are undefined.
        core_items: i32[C + 1], core `c` has items `core_items[c]` to `core_items[c + 1]`.
        merge_counts: i32[S], how many slots from this one on belong to one unit; 0 for all but a
            unit's first slot.
        first_slots: i32[R, H], a unit's first slot, -1 if it is in one piece, or empty.
    """

    items: jax.Array
    core_items: jax.Array
    merge_counts: jax.Array
    first_slots: jax.Array


@dataclass(frozen=True, kw_only=True)
class _Items:
    """Items of every unit, before rows' facts are added (units are numbered `row * H + head`)."""

    row: jax.Array  # i32[W]
    head: jax.Array  # i32[W]
    piece: jax.Array  # i32[W], which of its unit's pieces
    live: jax.Array  # bool[W]


def row_blocks(
    q_lens: jax.Array,
    kv_lens: jax.Array,
    window: jax.Array | int,
    *,
    page_size: int,
    block_kv: int,
) -> tuple[jax.Array, jax.Array]:
    """Finds the blocks of the cache that the new tokens of each row can see.

    Args:
        q_lens: i32[R], new tokens per row.
        kv_lens: i32[R], stored tokens per row, the new ones included.
        window: i32[], sliding window in tokens; no window if it is not positive.
        page_size: P, tokens.
        block_kv: tokens per block, a multiple or a divisor of P.

    Returns:
        The first logical page that is seen, i32[R], and the number of blocks from there to the
        end, i32[R]; 0 for rows without new or stored tokens.
    """
    first_token = jnp.where(window > 0, jnp.maximum(kv_lens - q_lens - window + 1, 0), 0)
    first_page = first_token // page_size
    tokens = kv_lens - first_page * page_size
    seen = (q_lens > 0) & (kv_lens > 0)
    return first_page, jnp.where(seen, (tokens + block_kv - 1) // block_kv, 0)


def schedule_decode(
    q_lens: jax.Array,
    kv_lens: jax.Array,
    window: jax.Array | int,
    *,
    num_kv_heads: int,
    page_size: int,
    max_pages_per_seq: int,
    block_kv: int,
    num_cores: int,
    split: int | None = None,
) -> Schedule:
    """Cuts a batch whose rows' new tokens all fit one query tile.

    Args:
        q_lens: i32[R], new tokens per row.
        kv_lens: i32[R], stored tokens per row, the new ones included.
        window: i32[], sliding window in tokens; no window if it is not positive.
        num_kv_heads: H.
        page_size: P, tokens.
        max_pages_per_seq: bound on a row's pages; matters with `split` only.
        block_kv: tokens per block, a multiple or a divisor of P.
        num_cores: C, thread blocks that run at the same time.
        split: blocks per item, for results that do not depend on the batch; None: balanced.

    Returns:
        The schedule.
    """
    first_page, blocks = row_blocks(q_lens, kv_lens, window, page_size=page_size, block_kv=block_kv)
    if split is None:
        cut = _cut_evenly(blocks, num_kv_heads, num_cores)
        num_slots = 2 * num_cores
    else:
        bound = -(-max_pages_per_seq * page_size // (split * block_kv))
        cut = _cut_at_multiples(blocks, num_kv_heads, num_cores, split, bound)
        num_slots = blocks.shape[0] * num_kv_heads * bound
    items, pieces, core, begin, end = cut
    row = items.row
    partial = items.live & (pieces[row, items.head] > 1)
    slot = jnp.where(partial, jnp.cumsum(partial, dtype=jnp.int32) - 1, -1)
    first = partial & (items.piece == 0)
    columns = dict(enumerate([row, items.head, None, end - begin, slot, None, None]))
    columns[TOKEN] = first_page[row] * page_size + begin * block_kv
    columns[KV_LEN], columns[Q_LEN] = kv_lens[row], q_lens[row]
    cores = jnp.arange(num_cores + 1, dtype=jnp.int32)
    return Schedule(
        items=jnp.stack([columns[i] for i in range(COLUMNS)], axis=1).astype(jnp.int32),
        core_items=_count((core < cores[:, None]) & items.live),
        merge_counts=jnp.zeros(num_slots, jnp.int32)
        .at[jnp.where(first, slot, num_slots)]
        .set(pieces[row, items.head], mode="drop"),
        first_slots=jnp.full(pieces.shape, -1, jnp.int32)
        .at[jnp.where(first, row, pieces.shape[0]), items.head]
        .set(slot, mode="drop"),
    )


def _count(true: jax.Array) -> jax.Array:
    return jnp.sum(true, axis=-1, dtype=jnp.int32)


def _enumerate(pieces: jax.Array, num_items: int) -> _Items:
    """Numbers the pieces (i32[R, H] per unit) of all units, unit after unit."""
    item = jnp.arange(num_items, dtype=jnp.int32)
    per_row = pieces.sum(axis=1, dtype=jnp.int32)
    row_end = jnp.cumsum(per_row, dtype=jnp.int32)
    row = jnp.minimum(_count(row_end <= item[:, None]), len(per_row) - 1)
    rest = item - (row_end - per_row)[row]
    head_end = jnp.cumsum(pieces, axis=1, dtype=jnp.int32)[row]
    head = jnp.minimum(_count(head_end <= rest[:, None]), pieces.shape[1] - 1)
    before = jnp.take_along_axis(head_end, head[:, None], axis=1)[:, 0] - pieces[row, head]
    return _Items(row=row, head=head, piece=rest - before, live=item < row_end[-1])


@dataclass(frozen=True, kw_only=True)
class _Buckets:
    """The line in C buckets whose sizes differ by one at most."""

    size: jax.Array  # i32[], of the smaller ones
    larger: jax.Array  # i32[], how many hold one more (the first ones)

    def begin(self, core: jax.Array) -> jax.Array:
        return core * self.size + jnp.minimum(core, self.larger)

    def core_of(self, place: jax.Array) -> jax.Array:
        turn = self.larger * (self.size + 1)
        late = self.larger + (place - turn) // self.size
        return jnp.where(place < turn, place // (self.size + 1), late)


def _lay_out(cost: jax.Array, heads: int, num_cores: int) -> tuple[jax.Array, _Buckets]:
    """Where each unit begins on the line, i32[R, H], given the cost of a unit of each row."""
    end = jnp.cumsum(cost, dtype=jnp.int32) * heads
    start = (end - cost * heads)[:, None] + cost[:, None] * jnp.arange(heads, dtype=jnp.int32)
    enough = end[-1] >= _SMALLEST * num_cores
    size = jnp.where(enough, end[-1] // num_cores, _SMALLEST)
    return start, _Buckets(size=size, larger=jnp.where(enough, end[-1] % num_cores, 0))


def _cut_evenly(blocks: jax.Array, heads: int, num_cores: int) -> tuple:
    """Items, pieces i32[R, H], and per item its core, first block and end, i32[W] each."""
    cost = jnp.where(blocks > 0, blocks + _OVERHEAD, 0)
    start, buckets = _lay_out(cost, heads, num_cores)
    first_core = buckets.core_of(start)
    last_core = buckets.core_of(start + cost[:, None] - 1)
    pieces = jnp.where(cost[:, None] > 0, last_core - first_core + 1, 0)
    items = _enumerate(pieces, blocks.shape[0] * heads + num_cores)
    core = first_core[items.row, items.head] + items.piece
    # The overhead lies before a unit's blocks; a cut through it leaves a piece of no blocks.
    zero = start[items.row, items.head] + _OVERHEAD
    begin, end = (jnp.clip(buckets.begin(c) - zero, 0, blocks[items.row]) for c in (core, core + 1))
    return items, pieces, core, begin, end


def _cut_at_multiples(
    blocks: jax.Array, heads: int, num_cores: int, split: int, max_pieces: int
) -> tuple:
    """As `_cut_evenly`, with items of `split` blocks."""
    row_pieces = (blocks + split - 1) // split
    start, buckets = _lay_out(blocks + row_pieces * _OVERHEAD, heads, num_cores)
    pieces = jnp.broadcast_to(row_pieces[:, None], start.shape)
    items = _enumerate(pieces, pieces.size * max_pieces)
    begin = items.piece * split
    end = jnp.minimum(begin + split, blocks[items.row])
    place = start[items.row, items.head] + items.piece * (split + _OVERHEAD)
    return items, pieces, buckets.core_of(place), begin, end
