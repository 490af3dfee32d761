"""Streaming attention for a batch of query tiles: one pass over pages, forward and backward.

An online softmax (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022) inside a loop
over the blocks of the tiles' walk (see `walk`). The backward pass recomputes the probabilities from
the log-sum-exp, block by block.

Shapes: B tiles, C = `block_q` queries per tile, K KV heads, G query heads per KV head, D head_dim,
S = `block_kv` tokens per block; R rows, M `max_pages_per_seq`, L layers, N pages, P `page_size`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from paxattn.attention.walk import Masking, Tiles, dot, walk
from paxattn.page_table.pages import varying_like


def _by_kv_head(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """`[B, C, K * G, ...] -> [B, K, C * G, ...]`: the queries that share a KV head, together."""
    b, c, h = x.shape[:3]
    x = x.reshape(b, c, num_kv_heads, h // num_kv_heads, *x.shape[3:])
    return jnp.moveaxis(x, 2, 1).reshape(b, num_kv_heads, -1, *x.shape[4:])


def _by_token(x: jax.Array, block_q: int) -> jax.Array:
    """The way back: `[B, K, C * G, ...] -> [B, C, K * G, ...]`."""
    b, k, cg = x.shape[:3]
    x = x.reshape(b, k, block_q, cg // block_q, *x.shape[3:])
    return jnp.moveaxis(x, 1, 2).reshape(b, block_q, -1, *x.shape[4:])


def attend_tiles(
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
    whole_pages: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Attends from a batch of query tiles to the pages of their sequences.

    Args:
        q: f32[B, C, K * G, D], scaled.
        k_pages: [L, N, K, P, D], any dtype.
        v_pages: same.
        tiles: whose queries they are.
        layer: i32[].
        window: i32[], sliding window in tokens; no window if it is not positive.
        masking: the static part of the mask.
        pages: pages per block.
        scales: of quantised K and V, [L, N, K, P] each, or None.
        whole_pages: pages per block of those that every live query sees whole, a multiple of
            `pages`; 0: they are masked like the others (a second loop has to pay: many queries).

    Returns:
        `o` f32[B, C, K * G, D] and `lse` f32[B, C, K * G]: partial results that merge with others
        of the same queries by log-sum-exp. 0 and -inf where nothing is visible.
    """
    num_kv_heads, _, head_dim = k_pages.shape[2:]
    block_q = q.shape[1]
    q = _by_kv_head(q, num_kv_heads)
    blocks = functools.partial(
        walk, q, k_pages, v_pages, tiles, layer=layer, window=window, masking=masking,
        scales=scales,
    )  # fmt: skip

    def step(read: Callable, j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        m, total, acc = carry
        _, _, v, s, _ = read(j)
        m_new = jnp.maximum(m, s.max(axis=-1))
        shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)  # nothing seen yet: exp(-inf), not NaN
        p = jnp.exp(s - shift[..., None])
        alpha = jnp.exp(m - shift)
        acc = acc * alpha[..., None] + dot(p, v, 3, 2)
        return m_new, total * alpha + p.sum(axis=-1), acc

    rows = q.shape[:3]
    init = (
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, head_dim), jnp.float32),
    )
    sums = jax.tree.map(lambda x: varying_like(x, q), init)
    done: jax.Array | int = 0
    if whole_pages:
        count, read = blocks(pages=whole_pages, masked=False)
        sums = lax.fori_loop(0, count, functools.partial(step, read), sums)
        done = count * (whole_pages // pages)
    count, read = blocks(pages=pages)
    m, total, acc = lax.fori_loop(done, count, functools.partial(step, read), sums)
    nothing = total == 0.0
    total = jnp.where(nothing, 1.0, total)
    lse = jnp.where(nothing, -jnp.inf, m + jnp.log(total))
    o = acc / total[..., None]
    return _by_token(o, block_q), _by_token(lse, block_q)


def attend_tiles_backward(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tiles: Tiles,
    lse: jax.Array,
    do: jax.Array,
    delta: jax.Array,
    dk_pages: jax.Array | None,
    dv_pages: jax.Array | None,
    *,
    layer: jax.Array,
    window: jax.Array,
    masking: Masking,
    pages: int,
    scales: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The gradient of `attend_tiles`, over the same blocks.

    Args:
        q: f32[B, C, K * G, D], scaled; 0 in places that are not live.
        k_pages: as in `attend_tiles`.
        v_pages: same.
        tiles: same.
        lse: f32[B, C, K * G], what the forward pass returned.
        do: f32[B, C, K * G, D], cotangent of `o`; 0 in places that are not live.
        delta: f32[B, C, K * G], `sum(o * do) - dlse`, with `dlse` the cotangent of `lse`.
        dk_pages: f32[L, N, K, P, D], added to; None where no gradient is wanted (quantised pages).
        dv_pages: same.
        layer: as in `attend_tiles`.
        window: same.
        masking: same.
        pages: same.
        scales: same.

    Returns:
        dq f32[B, C, K * G, D], dk_pages, dv_pages.
    """
    _, num_pages, num_kv_heads, page_size, head_dim = k_pages.shape
    block_q = q.shape[1]
    q, do, lse, delta = (_by_kv_head(x, num_kv_heads) for x in (q, do, lse, delta))
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    count, read = walk(
        q, k_pages, v_pages, tiles, layer=layer, window=window, masking=masking, pages=pages,
        scales=scales,
    )  # fmt: skip

    def add(acc: jax.Array, ids: jax.Array, block: jax.Array) -> jax.Array:
        # Pages may be shared by rows, and a page id may be the sentinel: add, and drop.
        block = block.reshape(*block.shape[:2], pages, page_size, head_dim)
        ids = jnp.where(ids >= 0, ids, num_pages)
        return acc.at[layer, ids].add(jnp.moveaxis(block, 1, 2), mode="drop")

    def step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dq, dk_pages, dv_pages = carry
        ids, k, v, s, slope = read(j)
        p = jnp.exp(s - lse[..., None])
        ds = p * (dot(do, v, 3, 3) - delta[..., None]) * slope
        if dk_pages is not None:
            dk_pages = add(dk_pages, ids, dot(ds, q, 2, 2))
            dv_pages = add(dv_pages, ids, dot(p, do, 2, 2))
        return dq + dot(ds, k, 3, 2), dk_pages, dv_pages

    dq, dk_pages, dv_pages = lax.fori_loop(0, count, step, (jnp.zeros_like(q), dk_pages, dv_pages))
    return _by_token(dq, block_q), dk_pages, dv_pages
