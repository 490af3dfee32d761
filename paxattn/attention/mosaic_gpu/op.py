"""The implementation named "mosaic_gpu": runs a plan's kernels, and joins their results.

Letters: T tokens of the ragged batch, R rows, C `ShortRows.max_q_len`, H KV heads, G group, D
head_dim; Q packed query rows of a decode tile (C x G, token-major, padded), V columns of V in the
decode kernel for Hopper.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxattn.attention.mosaic_gpu.common import LN2, LOWEST
from paxattn.attention.mosaic_gpu.config import packed_rows, wide_dtype
from paxattn.attention.mosaic_gpu.decode import attend
from paxattn.attention.mosaic_gpu.decode_refs import Tile
from paxattn.attention.mosaic_gpu.merge import merge
from paxattn.attention.mosaic_gpu.plan import Plan, ShortRows
from paxattn.attention.mosaic_gpu.portable import decode as portable_decode
from paxattn.attention.mosaic_gpu.portable import ring
from paxattn.attention.mosaic_gpu.portable.cards import Card
from paxattn.attention.mosaic_gpu.portable.config import packed_rows as portable_packed_rows
from paxattn.attention.mosaic_gpu.prefill import prefill_attention
from paxattn.attention.reference import add_sinks

# Queries become f16 for fp8 pages: scaled, so that bf16's range ends at 2**24 and not at 2**16.
_SMALL = np.float32(2.0**-8)


@functools.partial(jax.jit, static_argnames=("causal", "soft_cap", "interpret"))
def attend_batch(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    block_tables: jax.Array,
    cu_q_lens: jax.Array,
    layer: jax.Array | int | None,
    sm_scale: jax.Array | float,
    sliding_window: jax.Array | int | None,
    sinks: jax.Array | None,
    causal: bool,
    soft_cap: float | None,
    plan: Plan,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Serves a batch: each row by the kernel that the plan gives it to.

    Args:
        q: [T, H * G, D].
        k_pages: [L, N, H, P, D], or [N, H, P, D] without `layer`.
        v_pages: same.
        block_tables: i32[R, M].
        cu_q_lens: i32[R + 1].
        layer: i32[] or None.
        sm_scale: factor on `q . k`.
        sliding_window: i32[] (not positive: none), or None.
        sinks: f32[H * G] or None.
        causal: whether a query is blind to later positions.
        soft_cap: on scaled scores, or None.
        plan: for this batch and window.
        k_scales: [L, N, H, P], or [N, H, P] without `layer`, of quantised pages; or None.
        v_scales: same.
        interpret: parameters of Pallas' GPU interpreter, or None.

    Returns:
        o [T, H * G, D] in q's dtype, lse f32[T, H * G].
    """
    scales: tuple[jax.Array, ...] = ()
    if k_scales is not None and v_scales is not None:
        scales = k_scales, v_scales
    if layer is None:
        k_pages, v_pages, layer = k_pages[None], v_pages[None], 0
        scales = tuple(x[None] for x in scales)
    options: dict[str, Any] = dict(
        block_tables=block_tables, cu_q_lens=cu_q_lens, layer=layer, sm_scale=sm_scale,
        sliding_window=sliding_window, causal=causal, soft_cap=soft_cap, interpret=interpret,
    )  # fmt: skip
    if plan.long is not None:
        part = plan.long
        long: dict[str, Any] = dict(tiles=part.tiles, config=part.config, card=part.card)
        o, lse = prefill_attention(q, k_pages, v_pages, *scales, **long, **options)
    if plan.short is not None:
        # Sinks scale the result once more: round it only after that.
        options["out_dtype"] = q.dtype if sinks is None else jnp.float32
        few, few_lse = attend_short_rows(q, k_pages, v_pages, *scales, short=plan.short, **options)
        if plan.long is None:
            o, lse = few, few_lse
        else:  # a token is in one of them only
            served = plan.short.served[:, None]
            o = jnp.where(served[..., None], few, o.astype(few.dtype))
            lse = jnp.where(served, few_lse, lse)
    if sinks is not None:
        o, lse = add_sinks(o.astype(jnp.float32), lse, sinks.astype(jnp.float32))
    return o.astype(q.dtype), lse


def attend_short_rows(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *scales: jax.Array,
    block_tables: jax.Array,
    cu_q_lens: jax.Array,
    layer: jax.Array | int,
    sm_scale: jax.Array | float,
    sliding_window: jax.Array | int | None,
    causal: bool,
    soft_cap: float | None,
    short: ShortRows,
    out_dtype: Any,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Serves the rows whose queries fit one tile of the decode kernel, without sinks.

    Args:
        q: [T, H * G, D].
        k_pages: [L, N, H, P, D].
        v_pages: same.
        *scales: of quantised K and V, [L, N, H, P] each.
        block_tables: i32[R, M].
        cu_q_lens: i32[R + 1].
        layer: i32[].
        sm_scale: factor on `q . k`.
        sliding_window: i32[] (not positive: none), or None.
        causal: whether a query is blind to later positions.
        soft_cap: on scaled scores, or None.
        short: the plan of those rows.
        out_dtype: of `o`.
        interpret: parameters of Pallas' GPU interpreter, or None.

    Returns:
        o [T, H * G, D] and lse f32[T, H * G]; 0 and -inf for tokens of other rows.
    """
    group = q.shape[1] // k_pages.shape[2]
    options: dict[str, Any] = dict(
        block_tables=block_tables,
        cu_q_lens=cu_q_lens,
        layer=jnp.clip(jnp.asarray(layer, jnp.int32), 0, k_pages.shape[0] - 1),
        sm_scale=jnp.asarray(sm_scale, jnp.float32),
        sliding_window=sliding_window,
        short=short,
        out_dtype=out_dtype,
        interpret=interpret,
    )
    static: dict[str, Any] = dict(
        head_dim=k_pages.shape[4],
        page_size=k_pages.shape[3],
        num_pages=k_pages.shape[1],
        max_pages=block_tables.shape[1],
        group=group,
        causal=causal,
        soft_cap=soft_cap,
        dtype=q.dtype,
        interpret=interpret is not None,
    )
    if short.card is not None:
        options["card"] = short.card
    units = _hopper_units if short.card is None else _portable_units
    o, lse = units(q, k_pages, v_pages, *scales, static=static, **options)
    o = _unpack(o, short, group, 0.0)
    lse = _unpack(lse[:, :, None], short, group, LOWEST)[..., 0]
    return o, jnp.where(lse < 0.5 * LOWEST, -jnp.inf, lse * LN2)


def _hopper_units(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *scales: jax.Array,
    static: dict[str, Any],
    cu_q_lens: jax.Array,
    short: ShortRows,
    sm_scale: jax.Array,
    out_dtype: Any,
    interpret: Any,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs the decode kernel for Hopper and merges its pieces: o [R, H, D, Q], lse [R, H, Q]."""
    rows = packed_rows(short.max_q_len, static["group"])
    tile = Tile(**static, rows=rows, single=short.max_q_len == 1, config=short.config)
    if scales:
        tile = dataclasses.replace(tile, dtype=wide_dtype(k_pages.dtype), page_dtype=k_pages.dtype)
        q, sm_scale = (q * _SMALL.astype(q.dtype)).astype(tile.dtype), sm_scale / _SMALL
    schedule = short.schedule
    common = dict(out_dtype=out_dtype, interpret=interpret)
    o, lse, o_parts, lse_parts = attend(
        _pack(q, cu_q_lens, k_pages.shape[2], short.max_q_len, rows),
        k_pages,
        v_pages,
        *scales,
        schedule=schedule,
        tile=tile,
        sm_scale=sm_scale,
        **common,
        **options,
    )
    parts = merge(o_parts, lse_parts, schedule.merge_counts, **common)
    cut = schedule.first_slots >= 0
    o, lse = (
        jnp.where(
            cut.reshape(*cut.shape, *(1,) * (whole.ndim - 2)), merged[schedule.first_slots], whole
        )
        for whole, merged in zip((o, lse), parts, strict=True)
    )
    if tile.head_dim % 64:  # two parts of 64 columns that overlap: `Tile.chunks`
        o = jnp.concatenate([o[:, :, :64], o[:, :, 192 - tile.head_dim :]], axis=2)
    return o, lse


def _portable_units(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *scales: jax.Array,
    card: Card,
    static: dict[str, Any],
    cu_q_lens: jax.Array,
    short: ShortRows,
    sliding_window: jax.Array | int | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """The same by the portable decode kernel, which merges by itself."""
    rows = portable_packed_rows(short.max_q_len, static["group"], static["head_dim"])
    tile = ring.Tile(
        **static,
        rows=rows,
        window=sliding_window is not None,
        block_kv=short.config.block_kv,
        stages=short.config.stages,
        tma=card.tma,
        page_dtype=k_pages.dtype if scales else None,
    )
    o, lse = portable_decode.attend_units(
        _pack(q, cu_q_lens, k_pages.shape[2], short.max_q_len, rows),
        k_pages,
        v_pages,
        *scales,
        stored=short.stored,
        schedule=short.schedule,
        tile=tile,
        num_cores=short.config.num_cores,
        sliding_window=sliding_window,
        **options,
    )
    return o.swapaxes(2, 3), lse


def _pack(q: jax.Array, cu_q_lens: jax.Array, heads: int, max_q_len: int, rows: int) -> jax.Array:
    """`[T, H * G, D] -> [R, H, Q, D]`; places without a query hold anything."""
    tokens = cu_q_lens[:-1, None] + jnp.arange(max_q_len)
    tiles = q.at[tokens].get(mode="clip")
    r, c, _, d = tiles.shape
    tiles = jnp.moveaxis(tiles.reshape(r, c, heads, -1, d), 2, 1).reshape(r, heads, -1, d)
    return jnp.pad(tiles, ((0, 0), (0, 0), (0, rows - tiles.shape[2]), (0, 0)))


def _unpack(tiles: jax.Array, short: ShortRows, group: int, otherwise: float) -> jax.Array:
    """`[R, H, X, Q] -> [T, H * G, X]`, and `otherwise` for tokens that are not served."""
    r, heads, x, _ = tiles.shape
    tokens = short.max_q_len
    tiles = tiles[..., : tokens * group].reshape(r, heads, x, tokens, group)
    row, token = short.place // tokens, short.place % tokens
    # (Tokens are chosen before axes change places: then XLA makes one kernel of it all, not three.)
    tiles = tiles.at[row, :, :, token].get(mode="promise_in_bounds")
    tiles = tiles.swapaxes(2, 3).reshape(-1, heads * group, x)
    return jnp.where(short.served[:, None, None], tiles, otherwise)
