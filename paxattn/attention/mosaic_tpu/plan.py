"""Who is served by which tile of a batch: made once per step, shared by its layers.

Every live row is cut into tiles of queries, and each tile knows which of its row's tokens it must
read. Rows of few new tokens (decode, speculation) and long ones (prefill) get tiles of different
sizes, in a launch each: the kernel is the same. A tile depends on its own row alone, and blocks of
pages begin at multiples of their size, so a row's result does not depend on the batch.

Letters: T tokens of the ragged batch, R rows, M `max_pages_per_seq`, B tiles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from paxattn.attention.checks import Request
from paxattn.attention.extent import readable
from paxattn.attention.mosaic_tpu.config import LANES, Config
from paxattn.page_table import token_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of one launch; the first `count` are live.

    Attributes:
        rows: i32[B], of the batch.
        tokens: i32[B], where in the batch a tile's first query is.
        lens: i32[B], its queries.
        positions: i32[B], that query's position in its sequence; negative if there are more new
            tokens than stored ones.
        starts: i32[B], the first token that a tile reads.
        stops: i32[B], one past the last.
        count: i32[1].
        place: i32[T], where each token's result is in [B * block_q].
        served: bool[T], whether a token lies in a tile.
        config: block sizes.
    """

    rows: jax.Array
    tokens: jax.Array
    lens: jax.Array
    positions: jax.Array
    starts: jax.Array
    stops: jax.Array
    count: jax.Array
    place: jax.Array
    served: jax.Array
    config: Config = field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Plan:
    """A batch's work.

    Attributes:
        page_ids: i32[R, ceil(M / 128), 1, 128], the block tables in the pieces that the kernel
            streams (an axis of its own for what is sliced: others are tiled).
        launches: tiles of short rows, of long rows, or both.
    """

    page_ids: jax.Array
    launches: tuple[Tiles, ...]


@functools.partial(jax.jit, static_argnames=("request", "short", "long"))
def plan_batch(
    *,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    sliding_window: jax.Array | int | None,
    request: Request,
    short: Config,
    long: Config | None,
) -> Plan:
    """Cuts a batch.

    Args:
        block_tables: i32[R, M].
        kv_lens: i32[R].
        cu_q_lens: i32[R + 1].
        sliding_window: i32[] (not positive: none), or None.
        request: what is static about the call.
        short: block sizes for rows that fit one tile of its `block_q`.
        long: for the others; None if there can be none.

    Returns:
        The plan.
    """
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    history = kv_lens - q_lens
    sizes = dict(num_pages=request.num_pages, page_size=request.page_size)
    rows: dict[str, Any] = dict(
        stored=readable(block_tables, kv_lens, history, sliding_window, **sizes),
        first=history,
        q_lens=q_lens,
        cu_q_lens=cu_q_lens,
        window=sliding_window,
        request=request,
    )
    is_short = q_lens <= short.block_q
    launches = [_cut(is_short, most=request.num_rows, config=short, **rows)]
    if long is not None:
        # Every row's last tile may be partial, and a long row has more tokens than a short one.
        most = min(request.num_rows, request.num_tokens // (short.block_q + 1))
        most += request.num_tokens // long.block_q
        launches.append(_cut(~is_short, most=max(most, 1), config=long, **rows))
    padding = -block_tables.shape[1] % LANES
    page_ids = jnp.pad(block_tables, ((0, 0), (0, padding)))
    page_ids = page_ids.reshape(request.num_rows, -1, 1, LANES)
    return Plan(page_ids=page_ids, launches=tuple(launches))


def _cut(
    chosen: jax.Array,
    *,
    most: int,
    config: Config,
    stored: jax.Array,
    first: jax.Array,
    q_lens: jax.Array,
    cu_q_lens: jax.Array,
    window: jax.Array | int | None,
    request: Request,
) -> Tiles:
    """Cuts the chosen rows (bool[R]) into at most `most` tiles."""
    block_q = config.block_q
    chosen = chosen & (stored > 0) & (q_lens > 0)
    counts = jnp.where(chosen, -(-q_lens // block_q), 0)
    ends = jnp.cumsum(counts)
    begins = ends - counts
    tile = jnp.arange(most, dtype=jnp.int32)
    row = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, request.num_rows - 1)
    offset = (tile - begins[row]) * block_q
    position = first[row] + offset
    lens = jnp.minimum(block_q, q_lens[row] - offset)
    stop = stored[row]
    if request.causal:
        stop = jnp.minimum(stop, jnp.maximum(position + lens, 0))
    start = jnp.zeros_like(stop)
    if window is not None:
        start = jnp.where(window > 0, jnp.maximum(position - window + 1, 0), 0)
    # Queries before their sequence's start see nothing, but their tile gets a result all the same.
    start = jnp.minimum(start, jnp.maximum(stop - 1, 0))

    of, offsets, active = token_rows(q_lens, request.num_tokens)
    of = jnp.where(active, of, 0)
    return Tiles(
        rows=row,
        tokens=cu_q_lens[row] + offset,
        lens=lens,
        positions=position,
        starts=start,
        stops=stop,
        count=ends[-1:],
        place=jnp.clip(begins[of] * block_q + offsets, 0, most * block_q - 1),
        served=active & chosen[of],
        config=config,
    )
