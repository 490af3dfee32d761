"""What the prefill kernel works through: tiles of packed query rows, and the order they run in.

The queries of a row of the batch that read one KV head are *packed*: token `i`'s query head `g` of
the group is packed row `i * G + g`. Packed rows are cut into tiles of 128 (fewer for the portable
kernel), whatever G is, so a token's heads may lie in two tiles and nothing but a row's last tile is
padded. Tiles are stored in batch order (`pack_queries`, `unpack`), and worked through in another:
longest first, among those whose keys and values fit the L2 cache together.

A few tiles on long contexts would leave most thread blocks idle: where a batch is that small, its
tiles are done in pieces, each of which reads a part of the tokens, and `unpack` merges what they
found. Pieces come rounded to the result's dtype: that the result is rounded twice is less than the
tensor cores lose.

Letters: T tokens in the batch, R rows, M `max_pages_per_seq`, P `page_size`, D head_dim, Hq query
heads, Hkv KV heads, G = Hq / Hkv, B tiles, S `most_pieces`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paxattn.attention.extent import readable
from paxattn.attention.merge import merge
from paxattn.attention.mosaic_gpu.prefill_config import TILE

_L2_BYTES = 32 * 2**20  # of keys and values that tiles in flight may share; an H200 has 50 MiB
_MOST_PIECES = 32
_PIECE_TOKENS = 256  # that could be read in the time that a piece takes beside reading: a guess


class Tile(NamedTuple):
    """One tile, i32 scalars: a row of `Tiles.fields`.

    Attributes:
        place: where its result is stored: those of the first pieces of all tiles, in the order of
            the batch, then those of the second ones. Its queries are at `place % B`.
        row: of the batch.
        first_packed: number of its first packed row within its row of the batch.
        history: position of the batch row's first new token; negative if there are more queries
            than tokens.
        last: position of its last query.
        stored: tokens of the sequence that can be read; of a piece, where it ends.
        begin: where a piece begins, 0 or a multiple of `block_kv`.
    """

    place: jax.Array
    row: jax.Array
    first_packed: jax.Array
    history: jax.Array
    last: jax.Array
    stored: jax.Array
    begin: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A ragged batch, cut. The same for all layers of a step whose window is the same.

    Attributes:
        fields: i32[S * B, 7], `Tile`s (pieces of them) in the order of work.
        count: i32[], how many of them there are.
        heads_together: i32[], KV heads whose tiles are worked through side by side; the next heads
            follow when all tiles are done.
        row: i32[B], the row of the batch of each tile, in the order stored (like the rest).
        first_packed: i32[B].
        pieces: i32[B], that each tile is in.
        place: i32[T * G], where each packed row of the batch is stored, in `[0, B * size)`.
        served: bool[T], whether a token lies in a tile.
        size: packed rows of a tile.
        most_pieces: S, bound on the pieces of a tile.
    """

    fields: jax.Array
    count: jax.Array
    heads_together: jax.Array
    row: jax.Array
    first_packed: jax.Array
    pieces: jax.Array
    place: jax.Array
    served: jax.Array
    size: int = field(default=TILE, metadata=dict(static=True))
    most_pieces: int = field(default=1, metadata=dict(static=True))


def max_tiles(
    *, num_tokens: int, num_rows: int, group: int, min_packed: int, size: int = TILE
) -> int:
    """The static bound B on the number of tiles.

    Args:
        num_tokens: T.
        num_rows: R.
        group: G.
        min_packed: packed rows that every chosen row of the batch has at least.
        size: packed rows of a tile.

    Returns:
        B: full tiles, and for each row that may be chosen one that is not.
    """
    packed = num_tokens * group
    return -(-packed // size) + min(num_rows, packed // max(min_packed, 1))


def max_pieces(
    *, num_tokens: int, stored: int, group: int, num_kv_heads: int, num_ctas: int, size: int = TILE
) -> int:
    """The static bound S on the pieces of a tile: twice as many as busy all thread blocks.

    Args:
        num_tokens: T.
        stored: tokens that a row may have at most.
        group: G.
        num_kv_heads: Hkv.
        num_ctas: thread blocks that run at the same time.
        size: packed rows of a tile.

    Returns:
        S; 1 where the tiles of a full batch are enough, or rows too short to gain by it.
    """
    full = -(-num_tokens * group // size) * num_kv_heads
    if full >= num_ctas:
        return 1
    return max(min(2 * num_ctas // full, stored // (2 * _PIECE_TOKENS), _MOST_PIECES), 1)


def cut(
    *,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    chosen: jax.Array,
    window: jax.Array | None,
    causal: bool,
    num_tokens: int,
    group: int,
    num_kv_heads: int,
    num_pages: int,
    page_size: int,
    token_bytes: int,
    min_packed: int = 1,
    size: int = TILE,
    block_kv: int = 128,
    split_over: int | None = None,
) -> Tiles:
    """Cuts the chosen rows of a batch into tiles and puts them in order.

    Args:
        block_tables: i32[R, M].
        kv_lens: i32[R].
        cu_q_lens: i32[R + 1].
        chosen: bool[R].
        window: i32[] (not positive: none), or None.
        causal: whether a query is blind to later positions.
        num_tokens: T.
        group: G.
        num_kv_heads: Hkv.
        num_pages: N.
        page_size: P.
        token_bytes: of one token's key and value in one head.
        min_packed: as in `max_tiles`.
        size: packed rows of a tile.
        block_kv: tokens per step of the kernel.
        split_over: multiprocessors that a tile's tokens may be split over, where there are too few
            tiles to busy them; None: a row's result is to be independent of the batch.

    Returns:
        The tiles.
    """
    num_rows = kv_lens.shape[0]
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    history = kv_lens - q_lens
    stored = readable(
        block_tables, kv_lens, history, window, num_pages=num_pages, page_size=page_size
    )
    chosen = chosen & (stored > 0) & (q_lens > 0)
    counts = jnp.where(chosen, (q_lens * group + (size - 1)) // size, 0)
    ends = jnp.cumsum(counts)
    starts = ends - counts
    bound = max_tiles(
        num_tokens=num_tokens, num_rows=num_rows, group=group, min_packed=min_packed, size=size
    )

    tile = jnp.arange(bound, dtype=jnp.int32)
    row = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, num_rows - 1)
    first_packed = (tile - starts[row]) * size
    last_packed = jnp.minimum(first_packed + size, q_lens[row] * group) - 1
    last = history[row] + last_packed // group

    # Longest first, so that the last to run are short: cachefuls of rows, and tiles within them.
    end = jnp.minimum(stored[row], last + 1) if causal else stored[row]
    start = jnp.zeros_like(end)
    if window is not None:
        seen_from = history[row] + first_packed // group - window + 1
        start = jnp.where(window > 0, jnp.maximum(seen_from, 0), 0)
    together, section = _cachefuls(jnp.where(chosen, stored, 0), num_kv_heads, token_bytes)
    section = section[row]

    # A tile's pieces: as many tokens each, in whole blocks.
    most_pieces = 1
    if split_over is not None:
        most_pieces = max_pieces(
            num_tokens=num_tokens, stored=block_tables.shape[1] * page_size, group=group,
            num_kv_heads=num_kv_heads, num_ctas=split_over, size=size,
        )  # fmt: skip
    first = start // block_kv * block_kv
    tokens = jnp.where(tile < ends[-1], jnp.maximum(end - first, 0), 0)
    piece = _piece_tokens(tokens, most_pieces, num_kv_heads, split_over or 1, block_kv)
    pieces = jnp.where(tile < ends[-1], jnp.maximum(-(-tokens // piece), 1), 0)
    nth = jnp.arange(most_pieces, dtype=jnp.int32)[:, None]
    begin = first + nth * piece
    stop = jnp.where(nth + 1 < pieces, begin + piece, stored[row])

    def each(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, begin.shape).reshape(-1)

    fields = Tile(
        place=jnp.arange(begin.size, dtype=jnp.int32),
        row=each(row),
        first_packed=each(first_packed),
        history=each(history[row]),
        last=each(last),
        stored=each(stop),
        begin=each(begin),
    )
    length = jnp.minimum(stop, end) - jnp.maximum(begin, start)
    order = jnp.lexsort((each(-length), each(jnp.where(nth < pieces, section, num_rows + 1))))
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    of = jnp.searchsorted(cu_q_lens[1:], token, side="right", method="compare_all")
    inside = of < num_rows
    of = jnp.minimum(of, num_rows - 1)
    within = (token - cu_q_lens[of])[:, None] * group + jnp.arange(group, dtype=jnp.int32)
    return Tiles(
        fields=jnp.stack(fields, axis=1)[order],
        count=pieces.sum(),
        heads_together=together,
        row=row,
        first_packed=first_packed,
        pieces=pieces,
        place=jnp.clip(starts[of][:, None] * size + within, 0, bound * size - 1).reshape(-1),
        served=inside & chosen[of],
        size=size,
        most_pieces=most_pieces,
    )


def _cachefuls(
    stored: jax.Array, num_kv_heads: int, token_bytes: int
) -> tuple[jax.Array, jax.Array]:
    """Heads whose tiles are worked through side by side, i32[], and each row's cacheful, i32[R].

    Args:
        stored: i32[R], tokens that can be read of the chosen rows; 0 of others.
        num_kv_heads: Hkv.
        token_bytes: of one token's key and value in one head.
    """
    fits = max(_L2_BYTES // token_bytes, 1)
    together = jnp.clip(fits // jnp.maximum(stored.max(), 1), 1, num_kv_heads).astype(jnp.int32)
    share = jnp.maximum(fits // together, 1)
    held = jnp.minimum(stored, share)
    rank = jnp.argsort(-held)
    begin = jnp.cumsum(held[rank]) - held[rank]
    return together, jnp.zeros_like(held).at[rank].set(begin // share)


def _piece_tokens(
    tokens: jax.Array, most_pieces: int, num_kv_heads: int, num_ctas: int, block_kv: int
) -> jax.Array:
    """How many tokens each tile's pieces have: whole blocks, so that the batch is done soonest.

    Tried are the longest tile's 1, 2... pieces, and others' of that size. Whether the last thread
    block to end has one or two of them matters more than their number.

    Args:
        tokens: i32[B], that each tile reads; 0 for those beyond the last.
        most_pieces: S.
        num_kv_heads: Hkv.
        num_ctas: thread blocks that run at the same time.
        block_kv: tokens of a block.

    Returns:
        i32[B].
    """
    parts = jnp.arange(1, most_pieces + 1, dtype=jnp.int32)
    sizes = -(-jnp.maximum(tokens.max(), 1) // parts)
    items = num_kv_heads * (-(-tokens // sizes[:, None])).sum(axis=1)
    size = sizes[jnp.argmin(-(-items // num_ctas) * (sizes + _PIECE_TOKENS))]
    pieces = jnp.maximum(-(-tokens // size), 1)
    return jnp.maximum(-(-tokens // (pieces * block_kv)), 1) * block_kv


def pack_queries(q: jax.Array, tiles: Tiles, cu_q_lens: jax.Array, num_kv_heads: int) -> jax.Array:
    """Gathers queries into tiles.

    Args:
        q: [T, Hq, D].
        tiles: of the batch.
        cu_q_lens: i32[R + 1].
        num_kv_heads: Hkv.

    Returns:
        [Hkv, B, `tiles.size`, D]; rows beyond a tile's last hold any query.
    """
    tokens, num_q_heads, head_dim = q.shape
    group = num_q_heads // num_kv_heads
    first = cu_q_lens[tiles.row] * group + tiles.first_packed
    packed = first[:, None] + jnp.arange(tiles.size, dtype=jnp.int32)
    by_head = q.reshape(tokens, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    by_head = by_head.reshape(num_kv_heads, tokens * group, head_dim)
    return by_head.at[:, packed].get(mode="clip")


def unpack(
    o: jax.Array, lse: jax.Array, tiles: Tiles, num_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Brings tiles back to the order of tokens, and their pieces together.

    Args:
        o: [Hkv, S * B, `tiles.size`, D].
        lse: f32[Hkv, S * B, `tiles.size`].
        tiles: of the batch.
        num_tokens: T.

    Returns:
        o [T, Hq, D] and lse f32[T, Hq]; 0 and -inf for tokens that are in no tile.
    """
    num_kv_heads, head_dim = o.shape[0], o.shape[-1]

    def by_token(x: jax.Array, *rest: int) -> jax.Array:
        x = jnp.moveaxis(x.reshape(num_kv_heads, num_tokens, -1, *rest), 0, 1)
        return x.reshape(num_tokens, -1, *rest)

    o = o.reshape(num_kv_heads, tiles.most_pieces, -1, head_dim)
    lse = lse.reshape(num_kv_heads, tiles.most_pieces, -1)
    o, lse = (x.at[:, :, tiles.place].get(mode="promise_in_bounds") for x in (o, lse))
    if tiles.most_pieces == 1:
        o, lse = o[:, 0], lse[:, 0]
    else:
        there = jnp.arange(tiles.most_pieces)[:, None] < tiles.pieces[tiles.place // tiles.size]
        o, lse = jnp.where(there[..., None], o, 0.0), jnp.where(there, lse, -jnp.inf)
        o, lse = merge(o, lse, axis=1)
    served = tiles.served[:, None]
    o = jnp.where(served[..., None], by_token(o, head_dim), jnp.zeros((), o.dtype))
    return o, jnp.where(served, by_token(lse), -jnp.inf)
