"""What the prefill kernel works through: tiles of packed query rows, and the order they run in.

The queries of a row of the batch that read one KV head are *packed*: token `i`'s query head `g` of
the group is packed row `i * G + g`. Packed rows are cut into tiles of 128 (fewer for the portable
kernel), whatever G is, so a token's heads may lie in two tiles and nothing but a row's last tile is
padded. Tiles are stored in batch order (`pack_queries`, `unpack`), and worked through in another:
longest first, among those whose keys and values fit the L2 cache together.

Letters: T tokens in the batch, R rows, M `max_pages_per_seq`, P `page_size`, D head_dim, Hq query
heads, Hkv KV heads, G = Hq / Hkv, B tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paxattn.attention.extent import readable
from paxattn.attention.mosaic_gpu.prefill_config import TILE

_L2_BYTES = 32 * 2**20  # of keys and values that tiles in flight may share; an H200 has 50 MiB


class Tile(NamedTuple):
    """One tile, i32 scalars: a row of `Tiles.fields`.

    Attributes:
        place: where its queries are stored.
        row: of the batch.
        first_packed: number of its first packed row within its row of the batch.
        history: position of the batch row's first new token; negative if there are more queries
            than tokens.
        last: position of its last query.
        stored: tokens of the sequence that can be read.
    """

    place: jax.Array
    row: jax.Array
    first_packed: jax.Array
    history: jax.Array
    last: jax.Array
    stored: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A ragged batch, cut. The same for all layers of a step whose window is the same.

    Attributes:
        fields: i32[B, 6], `Tile`s in the order of work.
        count: i32[], how many of them there are.
        heads_together: i32[], KV heads whose tiles are worked through side by side; the next heads
            follow when all tiles are done.
        row: i32[B], the row of the batch of each tile, in the order stored (like the rest).
        first_packed: i32[B].
        place: i32[T * G], where each packed row of the batch is stored, in `[0, B * size)`.
        served: bool[T], whether a token lies in a tile.
        size: packed rows of a tile.
    """

    fields: jax.Array
    count: jax.Array
    heads_together: jax.Array
    row: jax.Array
    first_packed: jax.Array
    place: jax.Array
    served: jax.Array
    size: int = field(default=TILE, metadata=dict(static=True))


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
    fits = max(_L2_BYTES // token_bytes, 1)
    longest = jnp.maximum(jnp.where(chosen, stored, 0).max(), 1)
    together = jnp.clip(fits // longest, 1, num_kv_heads).astype(jnp.int32)
    share = jnp.maximum(fits // together, 1)
    held = jnp.where(chosen, jnp.minimum(stored, share), 0)
    rank = jnp.argsort(-held)
    begin = jnp.cumsum(held[rank]) - held[rank]
    section = jnp.zeros_like(held).at[rank].set(begin // share)[row]
    section = jnp.where(tile < ends[-1], section, num_rows + 1)
    order = jnp.lexsort((start - end, section))

    fields = Tile(
        place=tile,
        row=row,
        first_packed=first_packed,
        history=history[row],
        last=last,
        stored=stored[row],
    )
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    of = jnp.searchsorted(cu_q_lens[1:], token, side="right", method="compare_all")
    inside = of < num_rows
    of = jnp.minimum(of, num_rows - 1)
    within = (token - cu_q_lens[of])[:, None] * group + jnp.arange(group, dtype=jnp.int32)
    return Tiles(
        fields=jnp.stack(fields, axis=1)[order],
        count=ends[-1],
        heads_together=together,
        row=row,
        first_packed=first_packed,
        place=jnp.clip(starts[of][:, None] * size + within, 0, bound * size - 1).reshape(-1),
        served=inside & chosen[of],
        size=size,
    )


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
    """Brings tiles back to the order of tokens.

    Args:
        o: [Hkv, B, `tiles.size`, D].
        lse: f32[Hkv, B, `tiles.size`].
        tiles: of the batch.
        num_tokens: T.

    Returns:
        o [T, Hq, D] and lse f32[T, Hq]; 0 and -inf for tokens that are in no tile.
    """
    num_kv_heads, _, _, head_dim = o.shape

    def by_token(x: jax.Array, *rest: int) -> jax.Array:
        x = x.reshape(num_kv_heads, -1, *rest).at[:, tiles.place].get(mode="promise_in_bounds")
        x = jnp.moveaxis(x.reshape(num_kv_heads, num_tokens, -1, *rest), 0, 1)
        return x.reshape(num_tokens, -1, *rest)

    served = tiles.served[:, None]
    o = jnp.where(served[..., None], by_token(o, head_dim), jnp.zeros((), o.dtype))
    return o, jnp.where(served, by_token(lse), -jnp.inf)
