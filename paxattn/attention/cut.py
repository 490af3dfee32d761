"""How a ragged batch is cut into query tiles, and how tiles find their tokens and give them back.

Letters: T tokens in the batch, R rows, M `max_pages_per_seq`, B tiles, C queries per tile.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

from paxattn.attention import tuning
from paxattn.attention.walk import Masking, Tiles


@dataclass(frozen=True, kw_only=True)
class Config:
    """Block sizes of the reference, in tokens.

    Attributes:
        short_q: batches whose `max_q_len` is at most this are served as one tile per row.
        short_block_kv: tokens per row read in one loop step when every row is a tile; rounded down
            to whole pages (at least one), like `block_kv`.
        block_q: queries per tile of a long row.
        block_kv: tokens read in one loop step for such a tile.
        wide_block_q: as `block_q`, for rows that are not causal.
        wide_block_kv: as `block_kv`, for those.
        whole_block_kv: tokens read in one loop step where such rows see all of them. (The blocks of
            causal rows stay as they are: sums must not depend on where a chunk begins.)
    """

    short_q: int = 8
    short_block_kv: int = 128
    block_q: int = 32
    block_kv: int = 128
    wide_block_q: int = 128
    wide_block_kv: int = 512
    whole_block_kv: int = 2048


def default_config(
    *, num_rows: int, num_q_heads: int, num_kv_heads: int, head_dim: int, max_q_len: int
) -> Config:
    """Chooses block sizes: a block of all rows' keys should stay in a core's cache (1 MiB).

    Smaller blocks pay XLA's few microseconds per operation too often, larger ones go to memory
    and back. Tiles of 32 queries are about as fast as larger ones for long rows, and three times as
    fast for prompts of 20 tokens, which fill no larger one. Wide blocks are for few queries that
    see much (a prefix that rows share).

    Args:
        num_rows: R.
        num_q_heads: Hq.
        num_kv_heads: Hkv.
        head_dim: D.
        max_q_len: bound of the rows' query counts.

    Returns:
        The config.
    """
    tokens = 2**20 // (4 * num_rows * num_kv_heads * head_dim)
    wide = 2**19 // (num_q_heads * min(max_q_len, Config.wide_block_q))
    return Config(
        short_block_kv=min(max(tokens, 64), 512),
        wide_block_kv=min(max(wide, 128), 512),
        whole_block_kv=min(max(wide, 128), 2048),
    )


def candidates(default: Config, *, short: bool) -> Iterator[Config]:
    """What is tried when this machine is tuned.

    Args:
        default: the heuristic's config.
        short: whether all rows are served as one tile each.

    Yields:
        Configs that differ in what matters to such a batch.
    """
    if short:
        for size in (64, 128, 256, 512):
            yield dataclasses.replace(default, short_block_kv=size)
        return
    for block_q, block_kv in itertools.product((32, 64, 128), (64, 128, 256)):
        yield dataclasses.replace(default, block_q=block_q, block_kv=block_kv)


def choose_config(
    *, device: str, dtype: str, max_q_len: int, num_rows: int, num_q_heads: int,
    num_kv_heads: int, head_dim: int, page_size: int, page_dtype: str | None = None,
) -> Config:  # fmt: skip
    """Chooses block sizes: tuned ones, else the heuristic's.

    Args:
        device: the device's kind.
        dtype: of queries, and of pages that are not quantised.
        max_q_len: bound on a row's new tokens.
        num_rows: R.
        num_q_heads: Hq.
        num_kv_heads: Hkv.
        head_dim: D.
        page_size: P, tokens.
        page_dtype: of quantised pages, or None.

    Returns:
        The config.
    """
    default = default_config(
        num_rows=num_rows,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_q_len=max_q_len,
    )
    short = max_q_len <= default.short_q
    key = tuning.key_of(
        page_dtype, dtype=dtype, heads=num_kv_heads, head_dim=head_dim, page_size=page_size
    )
    if short:
        key["rows"] = num_rows  # (they are read together)
    return tuning.pick(
        f"reference.{'short' if short else 'long'}",
        device=device,
        key=key,
        default=default,
        candidates=candidates(default, short=short),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a call is about, apart from the arrays that have gradients.

    Attributes:
        block_tables: i32[R, M].
        kv_lens: i32[R].
        cu_q_lens: i32[R + 1].
        layer: i32[].
        window: i32[], no window if it is not positive.
        ancestors: u32[T], or None: the new tokens of a row form a chain.
        scales: of quantised K and V, [L, N, Hkv, P] each, or None.
        max_q_len: static bound of the rows' query counts.
        masking: static.
        config: static.
    """

    block_tables: jax.Array
    kv_lens: jax.Array
    cu_q_lens: jax.Array
    layer: jax.Array
    window: jax.Array
    ancestors: jax.Array | None
    scales: tuple[jax.Array, jax.Array] | None
    max_q_len: int = field(metadata=dict(static=True))
    masking: Masking = field(metadata=dict(static=True))
    config: Config = field(metadata=dict(static=True))

    @property
    def q_lens(self) -> jax.Array:
        """i32[R], new tokens per row."""
        return self.cu_q_lens[1:] - self.cu_q_lens[:-1]

    @property
    def tile_blocks(self) -> tuple[int, int, int]:
        """Of a long row: queries per tile, tokens that it reads in one loop step, seen whole."""
        config = self.config
        if self.masking.causal:
            return config.block_q, config.block_kv, config.block_kv
        return config.wide_block_q, config.wide_block_kv, config.whole_block_kv

    def short(self, num_tokens: int) -> bool:
        """Whether a tile per row serves: with few queries each, that fill a good part of them."""
        places = self.kv_lens.size * self.max_q_len
        if self.ancestors is not None:  # what the other driver does not know
            return True
        return self.max_q_len <= self.config.short_q and places <= 2 * num_tokens


def where_live(live: jax.Array, x: jax.Array, otherwise: jax.Array | float) -> jax.Array:
    """Selects by place of a tile: `x[B, C, ...]` where `live[B, C]`."""
    return jnp.where(live.reshape(*live.shape, *(1,) * (x.ndim - 2)), x, otherwise)


# One tile per row.


def row_tiles(batch: Batch, chosen: jax.Array, block_q: int) -> tuple[Tiles, jax.Array]:
    """Makes a tile of every row (chosen rows have queries).

    Args:
        batch: the batch.
        chosen: bool[R]; the tiles of other rows have nothing live.
        block_q: C, at least every chosen row's query count.

    Returns:
        The tiles (B = R), and the numbers of their tokens, i32[R, C] (for what is not live: any).
    """
    place = jnp.arange(block_q, dtype=jnp.int32)
    history = batch.kv_lens - batch.q_lens
    tokens = batch.cu_q_lens[:-1, None] + place
    depth, ancestors = place, None
    if batch.ancestors is not None:
        ancestors = take_rows(batch.ancestors, tokens)
        depth = lax.population_count(ancestors).astype(jnp.int32) - 1
    tiles = Tiles(
        positions=history[:, None] + depth,
        live=(place < batch.q_lens[:, None]) & chosen[:, None],
        first=history,
        last=jnp.where(chosen, batch.kv_lens - 1, -1),
        block_tables=batch.block_tables,
        kv_lens=batch.kv_lens,
        ancestors=ancestors,
    )
    return tiles, tokens


def take_rows(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """`x[tokens]`, where only the live token numbers need be in range."""
    return x.at[tokens].get(mode="clip")


def put_rows(into: jax.Array, tiled: jax.Array, batch: Batch, chosen: jax.Array) -> jax.Array:
    """Copies `tiled[R, C, ...]` to the tokens of the chosen rows in `into[T, ...]`.

    It is a gather by token: a CPU runs scatters one index at a time.
    """
    token = jnp.arange(into.shape[0], dtype=jnp.int32)
    row = jnp.searchsorted(batch.cu_q_lens[1:], token, side="right", method="compare_all")
    inside = row < batch.kv_lens.shape[0]
    row = jnp.where(inside, row, 0)
    place = token - batch.cu_q_lens[row]
    use = inside & chosen[row] & (place < tiled.shape[1])  # no more than `max_q_len` promised
    tiled = tiled.at[row, place].get(mode="clip")
    return jnp.where(use.reshape(-1, *(1,) * (into.ndim - 1)), tiled, into)


# Many tiles per row.


def count_tiles(batch: Batch, num_tokens: int) -> tuple[int, jax.Array]:
    """Cuts rows into tiles: those with two or more queries, or if not causal all.

    Args:
        batch: the batch.
        num_tokens: T.

    Returns:
        C, and the running count of tiles over rows, i32[R].
    """
    block_q = min(batch.tile_blocks[0], batch.max_q_len, num_tokens)
    some = (batch.q_lens > int(batch.masking.causal)) & (batch.kv_lens > 0)
    count = jnp.where(some, (batch.q_lens + block_q - 1) // block_q, 0)
    return block_q, jnp.cumsum(count, dtype=jnp.int32)


def nth_tile(
    batch: Batch, i: jax.Array, block_q: int, ends: jax.Array, num_tokens: int
) -> tuple[Tiles, jax.Array]:
    """Finds tile `i` of the batch's long rows.

    A tile's window of C tokens starts early where it would run past the array's end; the places
    that are not the tile's own are not live.

    Args:
        batch: the batch.
        i: i32[], below `ends[-1]`.
        block_q: from `count_tiles`.
        ends: same.
        num_tokens: T.

    Returns:
        The tile (B = 1), and the number of the token in its first place, i32[].
    """
    row = jnp.sum(ends <= i, dtype=jnp.int32)
    done = jnp.where(row > 0, ends[jnp.maximum(row - 1, 0)], 0)
    first = batch.cu_q_lens[row] + (i - done) * block_q
    end = jnp.minimum(first + block_q, batch.cu_q_lens[row + 1])
    start = jnp.minimum(first, num_tokens - block_q)
    token = start + jnp.arange(block_q, dtype=jnp.int32)
    before = batch.kv_lens[row] - batch.cu_q_lens[row + 1]  # position less token number
    last = before + end - 1
    if not batch.masking.causal:  # a query sees even a sequence that begins after it
        last = jnp.maximum(last, 0)
    tile = Tiles(
        positions=(before + token)[None],
        live=((token >= first) & (token < end))[None],
        first=(before + first)[None],
        last=last[None],
        block_tables=lax.dynamic_index_in_dim(batch.block_tables, row),
        kv_lens=lax.dynamic_index_in_dim(batch.kv_lens, row),
    )
    return tile, start


def take_window(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`x[start : start + size]`, with an axis for the batch of one tile."""
    return lax.dynamic_slice_in_dim(x, start, size)[None]


def put_window(into: jax.Array, tile: jax.Array, live: jax.Array, start: jax.Array) -> jax.Array:
    """Overwrites the live places of a window of `into` with those of `tile[1, C, ...]`."""
    new = where_live(live, tile, take_window(into, start, live.shape[1]))
    return lax.dynamic_update_slice_in_dim(into, new[0], start, 0)
