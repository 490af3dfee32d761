"""Parts of attention of the same queries, over different tokens, become the whole.

By log-sum-exp, as Flash-Decoding does (https://pytorch.org/blog/flash-decoding).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def merge(o: jax.Array, lse: jax.Array, axis: int = 0) -> tuple[jax.Array, jax.Array]:
    """Merges partial results, in f32; 0 and -inf where all of them are empty.

    Args:
        o: [..., S, ..., D], of S parts.
        lse: f32[..., S, ...], natural; -inf where a part saw nothing (its `o` must be finite).
        axis: where S is.

    Returns:
        o [..., ..., D] in its dtype, lse f32[..., ...].
    """
    top = lse.max(axis=axis, keepdims=True)
    weights = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))  # exp(-inf - 0) is 0, not NaN
    total = weights.sum(axis=axis, keepdims=True)
    total = jnp.where(total == 0.0, 1.0, total)  # (of log(0), too, the gradient would be NaN)
    merged = (o.astype(jnp.float32) * (weights / total)[..., None]).sum(axis=axis)
    return merged.astype(o.dtype), jnp.squeeze(jnp.log(total) + top, axis)
