"""KV heads that lie side by side in pairs: to an implementation, half as many of twice the size.

A query of a pair's first head is followed by zeros, one of its second head is preceded by them, so
that its scores are those of its own head; of its result the other half is left. The groups of query
heads of both follow each other as it is, and become one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from paxattn.attention.cascade import Run


def attend_pairs(
    run: Run,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    num_kv_heads: int,
    sinks: jax.Array | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs an implementation on pages that hold heads in pairs.

    Args:
        run: the implementation.
        q: [T, Hq, D].
        k_pages: [L, N, H, P, 2 D], or [N, H, P, 2 D] without layers.
        v_pages: same.
        num_kv_heads: 2 H, or 2 H - 1 if the last pair has one head.
        sinks: f32[Hq] or None.
        **options: what else `run` takes.

    Returns:
        o [T, Hq, D] in q's dtype, lse f32[T, Hq].
    """
    _, num_q_heads, head_dim = q.shape
    group = num_q_heads // num_kv_heads
    spare = 2 * k_pages.shape[-3] * group - num_q_heads
    if spare:
        q = jnp.pad(q, ((0, 0), (0, spare), (0, 0)))
        sinks = None if sinks is None else jnp.pad(sinks, (0, spare))
    second = (jnp.arange(num_q_heads + spare, dtype=jnp.int32) // group % 2 == 1)[:, None]
    nothing = jnp.zeros_like(q)
    halves = jnp.where(second, nothing, q), jnp.where(second, q, nothing)
    o, lse = run(jnp.concatenate(halves, axis=-1), k_pages, v_pages, sinks=sinks, **options)
    o = jnp.where(second, o[..., head_dim:], o[..., :head_dim])
    return o[:, :num_q_heads], lse[:, :num_q_heads]
