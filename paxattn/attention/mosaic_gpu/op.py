"""The implementation named "mosaic_gpu": packs a batch, runs the kernels, unpacks the results.

Letters: T tokens of the ragged batch, R rows, C `max_q_len`, H KV heads, G group, D head_dim; Q
packed query rows (C x G, token-major, padded to a multiple of 8), V columns of V in the kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from paxattn.attention.mosaic_gpu.common import LN2, LOWEST
from paxattn.attention.mosaic_gpu.config import Config, packed_rows
from paxattn.attention.mosaic_gpu.decode import attend
from paxattn.attention.mosaic_gpu.decode_kernel import Tile
from paxattn.attention.mosaic_gpu.merge import merge
from paxattn.attention.reference import add_sinks
from paxattn.attention.schedule import Schedule, schedule_decode


@functools.partial(
    jax.jit, static_argnames=("max_q_len", "causal", "soft_cap", "config", "interpret")
)
def attend_short_rows(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    layer: jax.Array | int | None,
    sm_scale: jax.Array | float,
    sliding_window: jax.Array | int,
    sinks: jax.Array | None,
    max_q_len: int,
    causal: bool,
    soft_cap: float | None,
    config: Config,
    chosen: jax.Array | None = None,
    schedule: Schedule | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Serves a batch in which every row's queries fit one tile of the decode kernel.

    Args:
        q: [T, H * G, D].
        k_pages: [L, N, H, P, D], or [N, H, P, D] without `layer`.
        v_pages: same.
        block_tables: i32[R, M].
        kv_lens: i32[R].
        cu_q_lens: i32[R + 1].
        layer: i32[] or None.
        sm_scale: factor on `q . k`.
        sliding_window: i32[]; not positive: none.
        sinks: f32[H * G] or None.
        max_q_len: C.
        causal: whether a query is blind to later positions.
        soft_cap: on scaled scores, or None.
        config: block sizes.
        chosen: bool[R], rows to serve (tokens of others give 0 and -inf), or None: all of them.
            Only the chosen ones need have at most C queries.
        schedule: of this step (for the chosen rows), if it is made once for several layers; None:
            it is made here.
        interpret: parameters of Pallas' GPU interpreter, or None.

    Returns:
        o [T, H * G, D] in q's dtype, lse f32[T, H * G].
    """
    if layer is None:
        k_pages, v_pages, layer = k_pages[None], v_pages[None], 0
    num_layers, num_pages, heads, page_size, head_dim = k_pages.shape
    group = q.shape[1] // heads
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    if chosen is not None:
        q_lens = jnp.where(chosen, q_lens, 0)
    window = jnp.asarray(sliding_window, jnp.int32)
    if schedule is None:
        schedule = make_schedule(
            q_lens, kv_lens, window, config=config,
            num_kv_heads=heads, page_size=page_size, max_pages_per_seq=block_tables.shape[1],
        )  # fmt: skip
    tile = Tile(
        rows=packed_rows(max_q_len, group),
        head_dim=head_dim,
        page_size=page_size,
        num_pages=num_pages,
        max_pages=block_tables.shape[1],
        group=group,
        single=max_q_len == 1,
        causal=causal,
        soft_cap=soft_cap,
        dtype=q.dtype,
        config=config,
    )
    # Sinks scale the result once more: round it only after that.
    out_dtype = q.dtype if sinks is None else jnp.float32
    o, lse, o_parts, lse_parts = attend(
        _pack(q, cu_q_lens, heads, max_q_len, tile.rows),
        k_pages,
        v_pages,
        block_tables=block_tables,
        schedule=schedule,
        layer=jnp.clip(jnp.asarray(layer, jnp.int32), 0, num_layers - 1),
        window=window,
        sm_scale=jnp.asarray(sm_scale, jnp.float32),
        tile=tile,
        out_dtype=out_dtype,
        interpret=interpret,
    )
    parts = merge(
        o_parts, lse_parts, schedule.merge_counts, out_dtype=out_dtype, interpret=interpret
    )
    cut = schedule.first_slots >= 0
    o, lse = (
        jnp.where(
            cut.reshape(*cut.shape, *(1,) * (whole.ndim - 2)), merged[schedule.first_slots], whole
        )
        for whole, merged in zip((o, lse), parts, strict=True)
    )
    live = (q_lens > 0) & (kv_lens > 0)
    if head_dim % 64:  # two parts of 64 columns that overlap: `Tile.chunks`
        o = jnp.concatenate([o[:, :, :64], o[:, :, 192 - head_dim :]], axis=2)
    o = _unpack(o, cu_q_lens, live, max_q_len, group, 0.0, q.shape[0])
    lse = _unpack(lse[:, :, None], cu_q_lens, live, max_q_len, group, LOWEST, q.shape[0])[..., 0]
    lse = jnp.where(lse < 0.5 * LOWEST, -jnp.inf, lse * LN2)
    if sinks is not None:
        o, lse = add_sinks(o, lse, sinks.astype(jnp.float32))
    return o.astype(q.dtype), lse


def make_schedule(
    q_lens: jax.Array,
    kv_lens: jax.Array,
    window: jax.Array,
    *,
    config: Config,
    num_kv_heads: int,
    page_size: int,
    max_pages_per_seq: int,
) -> Schedule:
    """The schedule that a config asks for.

    Args:
        q_lens: i32[R].
        kv_lens: i32[R].
        window: i32[], not positive: none.
        config: block sizes.
        num_kv_heads: H.
        page_size: P.
        max_pages_per_seq: M.

    Returns:
        The schedule.
    """
    return schedule_decode(
        q_lens,
        kv_lens,
        window,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        max_pages_per_seq=max_pages_per_seq,
        block_kv=config.block_kv,
        num_cores=config.num_cores,
        split=None if config.split is None else config.split // config.block_kv,
    )


def _pack(q: jax.Array, cu_q_lens: jax.Array, heads: int, max_q_len: int, rows: int) -> jax.Array:
    """`[T, H * G, D] -> [R, H, Q, D]`; places without a query hold anything."""
    tokens = cu_q_lens[:-1, None] + jnp.arange(max_q_len)
    tiles = q.at[tokens].get(mode="clip")
    r, c, _, d = tiles.shape
    tiles = jnp.moveaxis(tiles.reshape(r, c, heads, -1, d), 2, 1).reshape(r, heads, -1, d)
    return jnp.pad(tiles, ((0, 0), (0, 0), (0, rows - tiles.shape[2]), (0, 0)))


def _unpack(
    tiles: jax.Array,
    cu_q_lens: jax.Array,
    live: jax.Array,
    max_q_len: int,
    group: int,
    otherwise: float,
    num_tokens: int,
) -> jax.Array:
    """`[R, H, X, Q] -> [T, H * G, X]`, and `otherwise` for tokens of no live row."""
    r, heads, x, _ = tiles.shape
    tiles = tiles[..., : max_q_len * group].reshape(r, heads, x, max_q_len, group)
    tiles = tiles.transpose(0, 3, 1, 4, 2).reshape(r, max_q_len, heads * group, x)
    token = jnp.arange(num_tokens)
    row = jnp.sum(cu_q_lens[1:] <= token[:, None], axis=1)
    inside = row < r
    row = jnp.where(inside, row, 0)
    place = jnp.clip(token - cu_q_lens[row], 0, max_q_len - 1)
    return jnp.where((inside & live[row])[:, None, None], tiles[row, place], otherwise)
