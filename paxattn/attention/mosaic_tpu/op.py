"""The implementation named "mosaic_tpu": runs a plan's launches, and joins their results.

Letters: T tokens of the ragged batch, R rows, H KV heads, G group, D head_dim; B tiles of a launch,
C `block_q`, Q packed query rows of a tile (C x G, token-major, in whole registers).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from paxattn.attention.mosaic_tpu.config import LANES, packed_rows, scales_lie_ready
from paxattn.attention.mosaic_tpu.kernel import launch
from paxattn.attention.mosaic_tpu.plan import Plan, Tiles
from paxattn.attention.mosaic_tpu.refs import Shape
from paxattn.attention.reference import add_sinks


@functools.partial(jax.jit, static_argnames=("causal", "soft_cap", "interpret"))
def attend_batch(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    layer: jax.Array | int | None,
    sm_scale: jax.Array | float,
    sliding_window: jax.Array | int | None,
    sinks: jax.Array | None,
    causal: bool,
    soft_cap: float | None,
    plan: Plan,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Serves a batch.

    Args:
        q: [T, H * G, D].
        k_pages: [L, N, H, P, D], or [N, H, P, D] without `layer`.
        v_pages: same.
        layer: i32[] or None.
        sm_scale: factor on `q . k`.
        sliding_window: i32[] (not positive: none), or None.
        sinks: f32[H * G] or None.
        causal: whether a query is blind to later positions.
        soft_cap: on scaled scores, or None.
        plan: for this batch and window.
        k_scales: [L, N, H, P], or [N, H, P] without `layer`, of quantised pages (with 2 H, if each
            head is a pair of them, see `attention.pairs`); or None.
        v_scales: same.
        interpret: parameters of Pallas' TPU interpreter, or False.

    Returns:
        o [T, H * G, D] in q's dtype, lse f32[T, H * G].
    """
    scales: tuple[jax.Array, ...] = ()
    if k_scales is not None and v_scales is not None:
        scales = k_scales, v_scales
    if layer is None:
        k_pages, v_pages, layer = k_pages[None], v_pages[None], 0
        scales = tuple(x[None] for x in scales)
    num_layers, _, heads, page_size, head_dim = k_pages.shape
    layer = jnp.clip(jnp.asarray(layer, jnp.int32), 0, num_layers - 1)
    num_scales = scales[0].shape[2] if scales else heads
    if not scales_lie_ready(num_scales, page_size):
        scales = tuple(_laid_out(x, layer) for x in scales)
    # Sinks scale the result once more: round it only after that.
    out_dtype = q.dtype if sinks is None else jnp.float32
    o = jnp.zeros(q.shape, out_dtype)
    lse = jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    for tiles in plan.launches:
        shape = Shape(
            config=tiles.config,
            group=q.shape[1] // heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            page_size=page_size,
            causal=causal,
            window=sliding_window is not None,
            soft_cap=soft_cap,
            dtype=q.dtype,
            page_dtype=k_pages.dtype,
            out_dtype=out_dtype,
            scales_per_head=num_scales // heads,
        )
        found = launch(
            _pack(q, tiles, heads),
            k_pages,
            v_pages,
            plan.page_ids,
            *scales,
            tiles=tiles,
            layer=layer,
            window=jnp.asarray(0 if sliding_window is None else sliding_window, jnp.int32),
            sm_scale=jnp.asarray(sm_scale, jnp.float32),
            shape=shape,
            interpret=interpret,
        )
        tile_o, tile_lse = (_unpack(x, tiles, shape.group) for x in (found[0], found[1][..., None]))
        served = tiles.served[:, None]  # (a token is in one launch only)
        o = jnp.where(served[..., None], tile_o, o)
        lse = jnp.where(served, tile_lse[..., 0], lse)
    if sinks is not None:
        o, lse = add_sinks(o, lse, sinks.astype(jnp.float32))
    return o.astype(q.dtype), lse


def _laid_out(scales: jax.Array, layer: jax.Array) -> jax.Array:
    """A layer's scales as the kernel reads them.

    XLA turns over what it stores in another order, used or not. That is some copies of 1/64 of the
    bytes of the layer's pages (of head_dim 128), which by XLA's estimate take a third as long as
    to read all of those; more, were pages put together that follow each other.

    Args:
        scales: [L, N, H, P].
        layer: i32[].

    Returns:
        [1, N, H, P], or where P is less than 128, [1, Z, H, 128]: in line z the scales of pages z,
        Z + z, 2 Z + z...
    """
    scales = lax.dynamic_slice_in_dim(scales, layer, 1)
    _, num_pages, heads, page_size = scales.shape
    if page_size % LANES == 0:
        return scales
    together = LANES // page_size
    lines = -(-num_pages // together // LANES) * LANES
    scales = jnp.pad(scales[0], ((0, lines * together - num_pages), (0, 0), (0, 0)))
    scales = scales.reshape(together, lines, heads, page_size).transpose(1, 2, 0, 3)
    return scales.reshape(1, lines, heads, LANES)


def _pack(q: jax.Array, tiles: Tiles, heads: int) -> jax.Array:
    """`[T, H * G, D] -> [B, H, Q, D]`; places without a query hold anything."""
    block_q, (_, num_q_heads, head_dim) = tiles.config.block_q, q.shape
    group = num_q_heads // heads
    tokens = tiles.tokens[:, None] + jnp.arange(block_q, dtype=jnp.int32)
    packed = q.at[tokens].get(mode="clip").reshape(-1, block_q, heads, group, head_dim)
    packed = jnp.moveaxis(packed, 2, 1).reshape(-1, heads, block_q * group, head_dim)
    padding = packed_rows(block_q, group) - block_q * group
    return jnp.pad(packed, ((0, 0), (0, 0), (0, padding), (0, 0)))


def _unpack(packed: jax.Array, tiles: Tiles, group: int) -> jax.Array:
    """`[B, H, Q, X] -> [T, H * G, X]`; undefined for tokens that are not served."""
    block_q, (num_tiles, heads, _, columns) = tiles.config.block_q, packed.shape
    packed = packed[:, :, : block_q * group].reshape(num_tiles, heads, block_q, group, columns)
    packed = jnp.moveaxis(packed, 1, 2).reshape(num_tiles * block_q, heads * group, columns)
    return packed.at[tiles.place].get(mode="promise_in_bounds")
