"""The walk of a batch of query tiles over the pages of their sequences: what is read, who sees it.

A *tile* is up to `block_q` query tokens of one sequence. A batch of tiles walks its sequences'
pages together, `block_kv` tokens at a time. The number of blocks is data: they start at the first
page a sliding window can see and end with the longest live tile, so the work follows what is
stored and not what a block table could hold.

Blocks that every query of the batch of tiles sees whole can be walked first, without masks. What
lies in a slot that a tile may not see (page tails, other sequences' pages, pages never written) is
replaced by zero or masked by selection before it meets arithmetic, NaN included.

Shapes: B tiles, C = `block_q` queries per tile, K KV heads, G query heads per KV head, D head_dim,
S = `block_kv` tokens per block; R rows, M `max_pages_per_seq`, L layers, N pages, P `page_size`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

_HIGHEST = lax.Precision.HIGHEST
_FEW_QUERIES = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Which queries a batch of tiles holds, and what they may look at.

    Attributes:
        positions: i32[B, C], place of each query in its sequence.
        live: bool[B, C], False for the unused places of a tile.
        first: i32[B], lowest position of a live query.
        last: i32[B], highest position of a live query (not causal: at least 0), -1 in a tile
            without any.
        block_tables: i32[B, M], the pages of each tile's sequence.
        kv_lens: i32[B], tokens stored for each tile's sequence.
        ancestors: u32[B, C], for each query which tokens it sees of the up to 32 that begin at
            `first` (bit j: token `first + j`); the last stored tokens form a tree then, parents
            before children, and a query's position counts its ancestors. None: a chain.
    """

    positions: jax.Array
    live: jax.Array
    first: jax.Array
    last: jax.Array
    block_tables: jax.Array
    kv_lens: jax.Array
    ancestors: jax.Array | None = None


@dataclass(frozen=True, kw_only=True)
class Masking:
    """What is static about who sees whom: `causal`, and the `soft_cap` on scores (or None)."""

    causal: bool
    soft_cap: float | None


def _plan(
    tiles: Tiles, page_size: int, pages: int, window: jax.Array, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Finds the blocks of `pages` pages that some live query can see.

    Every tile counts its blocks from its own first page. Its sums are therefore taken in an order
    that depends on nothing but itself, whatever else is in the batch.

    Returns:
        Each tile's first page (i32[B], logical), and how many blocks all need (i32[]).
    """
    end = jnp.minimum(tiles.kv_lens, tiles.last + 1) if causal else tiles.kv_lens
    first = jnp.maximum(tiles.first, 0)  # a query before the sequence's start is below 0
    start = jnp.where(window > 0, jnp.maximum(first - window + 1, 0), 0)
    first_page = start // page_size
    tokens = jnp.where(tiles.last >= 0, end - first_page * page_size, 0)
    return first_page, jnp.max(_ceil_div(tokens, pages * page_size))


def _ceil_div(a: jax.Array, b: int) -> jax.Array:
    """`ceil(a / b)`, and 0 for a negative `a`."""
    return jnp.maximum(a + b - 1, 0) // b


def _whole(
    tiles: Tiles, num_pages: int, page_size: int, window: jax.Array, causal: bool
) -> jax.Array:
    """How many of the first tokens every live query sees, i32[]; 0 under a window."""
    seen = jnp.minimum(tiles.kv_lens, tiles.first) if causal else tiles.kv_lens
    is_page = (tiles.block_tables >= 0) & (tiles.block_tables < num_pages)
    missing = jnp.argmin(is_page, axis=1).astype(jnp.int32)
    missing = jnp.where(is_page.all(axis=1), is_page.shape[1], missing)
    seen = jnp.where(tiles.last >= 0, jnp.minimum(seen, missing * page_size), 0)
    return jnp.where(window > 0, 0, jnp.maximum(jnp.min(seen), 0))


def _page_ids(tiles: Tiles, logical: jax.Array) -> jax.Array:
    """The physical pages of logical ones (both i32[B, pages]); past the table, its last entry."""
    last = tiles.block_tables.shape[1] - 1
    return jnp.take_along_axis(
        tiles.block_tables, jnp.minimum(logical, last), axis=1, mode="promise_in_bounds"
    )


def _visible(
    tiles: Tiles,
    is_page: jax.Array,
    first: jax.Array,
    page_size: int,
    window: jax.Array,
    masking: Masking,
) -> tuple[jax.Array, jax.Array]:
    """Tokens held by pages that begin at token `first` (both i32[B, pages]), and who sees them.

    The sentinel (and any other number that is no page) hides its tokens: reading some other
    sequence's page in its stead would be a leak. Who sees them is bool[B, C, S].
    """
    held = jnp.where(is_page, jnp.clip(tiles.kv_lens[:, None] - first, 0, page_size), 0)
    offset = jnp.arange(page_size, dtype=jnp.int32)
    stored = (offset < held[..., None]).reshape(first.shape[0], 1, -1)
    position = (first[..., None] + offset).reshape(first.shape[0], 1, -1)
    distance = tiles.positions[:, :, None] - position
    if tiles.ancestors is not None:
        node = position - tiles.first[:, None, None]
        # The query's ancestors from this node on, were it one of them: itself and its descendants.
        onward = tiles.ancestors[:, :, None] >> jnp.clip(node, 0, 31).astype(jnp.uint32)
        steps = lax.population_count(onward).astype(jnp.int32) - 1
        distance = jnp.where(node >= 0, steps, distance)
        stored &= (node < 0) | ((onward & 1) == 1)
    seen = stored & tiles.live[:, :, None] & ((distance < window) | (window <= 0))
    return held, seen & (distance >= 0) if masking.causal else seen


def _gather(pool: jax.Array, layer: jax.Array, ids: jax.Array, held: jax.Array) -> jax.Array:
    """Reads a block of pages, f32[B, K, S, ...], with zeros where nothing is stored.

    The gather takes `[layer, page]` pairs straight from the stacked pool (no slice of a layer
    exists at any time) and puts the head axis before the pages, so that nothing is transposed.
    A page's tile is one flat run of numbers here: XLA then copies, clears and converts it in one
    vectorised loop, and does not read what is cleared.
    """
    num_layers, num_pages, num_heads, page_size, *rest = pool.shape
    batch, pages = ids.shape
    per_token = math.prod(rest)
    tile = page_size * per_token
    dims = lax.GatherDimensionNumbers(
        offset_dims=(1, 3), collapsed_slice_dims=(0, 1), start_index_map=(0, 1)
    )
    block = lax.gather(
        pool.reshape(num_layers, num_pages, num_heads, tile),
        jnp.stack([jnp.broadcast_to(layer, ids.shape), jnp.clip(ids, 0, num_pages - 1)], axis=-1),
        dims,
        (1, 1, num_heads, tile),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    kept = jnp.arange(tile, dtype=jnp.int32) < (held * per_token)[:, None, :, None]
    block = jnp.where(kept, block, jnp.zeros((), block.dtype)).astype(jnp.float32)
    return block.reshape(batch, num_heads, pages * page_size, *rest)


def _load(
    pages: jax.Array, scales: jax.Array | None, layer: jax.Array, ids: jax.Array, held: jax.Array
) -> jax.Array:
    """Reads a block of K or V, f32[B, K, S, D]: of quantised pages what the numbers stand for.

    Scales are [L, N, K, P], or [L, N, 2 K, P] if each half of D has its own.
    """
    block = _gather(pages, layer, ids, held)
    if scales is None:
        return block
    batch, heads, tokens, _ = block.shape
    factors = _gather(scales, layer, ids, held).reshape(batch, heads, -1, tokens, 1)
    factors = jnp.moveaxis(factors, 2, 3)
    parts = block.reshape(batch, heads, tokens, factors.shape[3], -1)
    return (parts * factors).reshape(block.shape)


def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """Matrix product per (tile, KV head), in f32."""
    return lax.dot_general(
        a, b, (((contract_a,), (contract_b,)), ((0, 1), (0, 1))), precision=_HIGHEST
    )


def _q_dot_k(q: jax.Array, k: jax.Array) -> jax.Array:
    """`q @ k.T` per (tile, KV head).

    For few queries a matrix-vector product each: on a CPU, a product of matrices first repacks
    all of `k`, which only many queries repay.
    """
    if q.shape[2] > _FEW_QUERIES:
        return dot(q, k, 3, 3)
    rows = [dot(q[:, :, i : i + 1], k, 3, 3) for i in range(q.shape[2])]
    return jnp.concatenate(rows, axis=2)


def _scores(
    q: jax.Array, k: jax.Array, seen: jax.Array | None, soft_cap: float | None
) -> tuple[jax.Array, jax.Array]:
    """Scores f32[B, K, C * G, S], masked unless all is seen; the soft cap's derivative, or 1."""
    s = _q_dot_k(q, k)
    slope = jnp.float32(1.0)
    if soft_cap is not None:
        t = jnp.tanh(s / soft_cap)
        s, slope = soft_cap * t, 1.0 - t * t
    if seen is None:
        return s, slope
    group = s.shape[2] // seen.shape[1]
    mask = jnp.repeat(seen, group, axis=1)[:, None]
    return jnp.where(mask, s, -jnp.inf), slope


def walk(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tiles: Tiles,
    *,
    layer: jax.Array,
    window: jax.Array,
    masking: Masking,
    pages: int,
    scales: tuple[jax.Array, jax.Array] | None,
    masked: bool = True,
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, ...]]]:
    """The walk over the pages of a batch of tiles; arguments as in `tiles.attend_tiles`.

    If not `masked`, only over the first blocks, which every query sees whole.

    Returns:
        The number of blocks, i32[], and a function that reads block `j`: its page ids
        i32[B, pages], its K and V f32[B, K, S, D], and what `_scores` returns.
    """
    num_pages, page_size = k_pages.shape[1], k_pages.shape[3]
    first_page, count = _plan(tiles, page_size, pages, window, masking.causal)
    if not masked:
        whole = _whole(tiles, num_pages, page_size, window, masking.causal)
        count = whole // (pages * page_size)

    def read(j: jax.Array) -> tuple[jax.Array, ...]:
        logical = first_page[:, None] + j * pages + jnp.arange(pages, dtype=jnp.int32)
        ids = _page_ids(tiles, logical)
        held, seen = jnp.full(ids.shape, page_size, jnp.int32), None
        if masked:
            is_page = (ids >= 0) & (ids < num_pages)
            held, seen = _visible(tiles, is_page, logical * page_size, page_size, window, masking)
        k_scales, v_scales = (None, None) if scales is None else scales
        k = _load(k_pages, k_scales, layer, ids, held)
        v = _load(v_pages, v_scales, layer, ids, held)
        return ids, k, v, *_scores(q, k, seen, masking.soft_cap)

    return count, read
