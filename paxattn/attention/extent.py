"""How much of its sequence a row can read: what kernels that follow a block table must know."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def readable(
    block_tables: jax.Array,
    kv_lens: jax.Array,
    history: jax.Array,
    window: jax.Array | int | None,
    *,
    num_pages: int,
    page_size: int,
) -> jax.Array:
    """How many of each row's tokens lie in pages.

    `kv_lens`, unless the table has a hole (a sentinel, or another number that is no page) before
    that: then what follows the hole is hidden, for a kernel would read somebody else's page.
    Pages that the window of every new token has left behind are not read: they may be missing.

    Args:
        block_tables: i32[R, M].
        kv_lens: i32[R].
        history: i32[R], tokens stored before the new ones.
        window: sliding window, i32[] (not positive: none), or None.
        num_pages: pages in the pool.
        page_size: tokens per page.

    Returns:
        i32[R].
    """
    seen_from = jnp.zeros_like(history)
    if window is not None:
        seen_from = jnp.where(window > 0, jnp.maximum(history - window + 1, 0), 0)
    first = jnp.arange(block_tables.shape[1], dtype=jnp.int32) * page_size
    hole = ((block_tables < 0) | (block_tables >= num_pages)) & (first < kv_lens[:, None])
    hole &= first + page_size > seen_from[:, None]
    until = jnp.where(hole, first, block_tables.shape[1] * page_size).min(axis=1)
    return jnp.minimum(kv_lens, until)
