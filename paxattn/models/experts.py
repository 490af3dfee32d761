"""A mixture of experts: each token goes through a few of many MLPs (arXiv:1701.06538).

Tokens are put in order of their experts, and each expert's share is cut into tiles of a few rows
(as in MegaBlocks, arXiv:2211.15841, but one after the other). A loop over the tiles that there are
takes the tile's expert by its index and multiplies. So

- an expert that no token goes to is neither read nor computed, and padding goes nowhere;
- beyond ``tokens * per_token`` rows, less than one tile per expert in use is computed;
- what is held besides the result is ``tokens * per_token`` rows of the hidden size, and a copy of
  one expert, which XLA makes of what an index has chosen: a tile costs about three readings of its
  expert's matrices.

``lax.ragged_dot`` does the same in one operation, but on CPUs and GPUs XLA multiplies every row
with every expert: for 32 experts of 2880 x 5760 that is 32 times the work, and on a CPU 1 to 2 GB
of scratch for a single token (read from programs compiled by jax 0.10 and 0.12).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from paxattn.models.decoder_config import Experts
from paxattn.models.weights import flat, product

_LEAST_TILE, _LARGEST_TILE = 8, 128  # rows


def mix_experts(
    x: jax.Array,
    router_logits: jax.Array,
    live: jax.Array,
    matrices: Mapping[str, jax.Array],
    vectors: Mapping[str, jax.Array],
    layer: jax.Array,
    experts: Experts,
) -> jax.Array:
    """Send each token through its experts, and add up what they say.

    Letters: T tokens, E experts, H hidden size, I intermediate size, L layers.

    Args:
        x: ``[T, H]``.
        router_logits: ``[T, E]``.
        live: bool[T]; the others are padding, and give zeros.
        matrices: of all layers, ``expert_gate_up`` ``[L, E, I, 2, H]`` and ``expert_down``
            ``[L, E, H, I]``.
        vectors: of this layer, ``expert_gate_up_bias`` ``[E, I, 2]`` and ``expert_down_bias``
            ``[E, H]``.
        layer: i32[], which one.
        experts: how many per token, and what is between their products.

    Returns:
        ``[T, H]`` in x's dtype.
    """
    gate_up, down = matrices["expert_gate_up"], matrices["expert_down"]
    gate_up_bias, down_bias = vectors["expert_gate_up_bias"], vectors["expert_down_bias"]
    num_tokens, num_experts = router_logits.shape
    top, chosen = lax.top_k(router_logits.astype(jnp.float32), experts.per_token)
    shares = jax.nn.softmax(top, axis=-1)

    # Counting sort: where each pair of token and expert stands among all, in order of experts.
    rows = num_tokens * experts.per_token
    goes = (chosen[..., None] == jnp.arange(num_experts)) & live[:, None, None]
    goes = goes.reshape(rows, num_experts)
    rank = jnp.cumsum(goes, axis=0, dtype=jnp.int32)
    counts = rank[-1]
    starts = jnp.cumsum(counts) - counts
    places = jnp.sum(jnp.where(goes, starts + rank - 1, 0), axis=1)

    # As many rows to a tile as an expert has on average, in eights.
    tile = min(_LARGEST_TILE, -(-rows // (num_experts * _LEAST_TILE)) * _LEAST_TILE)
    places = jnp.where(jnp.any(goes, axis=1), places, rows + tile)  # padding: nowhere
    tiles = -(-counts // tile)
    tile_ends = jnp.cumsum(tiles)
    tokens = jnp.zeros(rows + tile, jnp.int32)
    tokens = tokens.at[places].set(jnp.arange(rows) // experts.per_token, mode="drop")

    def run_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(tile_ends, i, side="right", method="compare_all")
        start = starts[expert] + (i - tile_ends[expert] + tiles[expert]) * tile
        h = x[lax.dynamic_slice_in_dim(tokens, start, tile)]
        h = product(h, flat(gate_up[layer, expert])).reshape(tile, -1, 2)
        h = _clamped_swiglu(h + gate_up_bias[expert], experts)
        h = product(h.astype(x.dtype), down[layer, expert]) + down_bias[expert]
        # Rows beyond the expert's own belong to the next tile, which overwrites them.
        return lax.dynamic_update_slice_in_dim(out, h.astype(x.dtype), start, axis=0)

    out = jnp.zeros((rows + tile, x.shape[1]), x.dtype)
    out = lax.fori_loop(0, tile_ends[-1], run_tile, out)
    out = out.at[places].get(mode="fill", fill_value=0).reshape(num_tokens, experts.per_token, -1)
    return jnp.einsum("tk,tkh->th", shares, out.astype(jnp.float32)).astype(x.dtype)


def _clamped_swiglu(gate_up: jax.Array, experts: Experts) -> jax.Array:
    """``[..., I, 2]`` to ``[..., I]``."""
    gate = jnp.minimum(gate_up[..., 0], experts.limit)
    up = jnp.clip(gate_up[..., 1], -experts.limit, experts.limit)
    return (up + 1) * gate * jax.nn.sigmoid(experts.alpha * gate)
