"""Paged attention as a building block for Flax models.

`attend` is the one place where a layer's new keys and values are written and then read back
through the page table. `attend_heads` adds what surrounds it in most decoders (splitting heads,
q/k normalisation, rotation), and `PagedAttention` is the whole layer, projections included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from paxattn import kv_cache
from paxattn.attention import AttentionSchedule, attention_schedule, paged_attention
from paxattn.kv_cache import KVCache
from paxattn.page_table.inputs import check_positive
from paxattn.ragged import RaggedBatch, check_same_pool
from paxattn.rope import Rope


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    batch: RaggedBatch,
    *,
    layer: jax.Array | int,
    **options: Any,
) -> tuple[jax.Array, KVCache]:
    """Write one layer's new keys and values, then attend to everything the rows hold.

    Args:
        q: ``[T, num_q_heads, head_dim]``.
        k: ``[T, num_kv_heads, head_dim]``, this step's keys (already rotated).
        v: the same shape, this step's values.
        cache: the pages of all layers; carried through the layers and donated to the step. Float
            pages of another dtype than q's have q cast to theirs.
        batch: the step's packing, from `ragged.ragged_batch`.
        layer: which layer, an integer or i32[] (a scan's counter).
        **options: for `paged_attention`: ``sm_scale``, ``sliding_window``, ``soft_cap``, ``sinks``,
            ``implementation``, ...

    Returns:
        (``[T, num_q_heads, head_dim]`` in q's dtype, the cache with the new tokens in it). Padding
        tokens give zeros and write nothing.

    Raises:
        ValueError: the cache and the batch's table differ in pages or page size, or a shape does
            not fit them.
        TypeError: q, k or v is no array of floats.
    """
    check_same_pool(cache, batch)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(f"{name} has dtype {jnp.result_type(x)}, must be floats")
    if q.shape[:1] != batch.positions.shape:
        raise ValueError(f"{q.shape=} must begin with {batch.positions.size}, the batch's tokens")
    cache = kv_cache.write(cache, layer, batch.slots, k, v)
    out = paged_attention(
        q.astype(cache.query_dtype(q.dtype)),
        cache.k_pages,
        cache.v_pages,
        k_scales=cache.k_scales,
        v_scales=cache.v_scales,
        block_tables=batch.block_tables,
        kv_lens=batch.kv_lens,
        cu_q_lens=batch.cu_q_lens,
        layer=layer,
        max_q_len=batch.max_q_len,
        ancestors=batch.ancestors,
        shared=batch.shared,
        num_kv_heads=cache.num_kv_heads,
        **options,
    )
    return out.astype(q.dtype), cache


def schedule_attention(
    batch: RaggedBatch, cache: KVCache, *, num_q_heads: int, dtype: DTypeLike, **options: Any
) -> AttentionSchedule:
    """Divide a step's attention over the device, once for all layers that share a sliding window.

    For a model that scans over its layers: pass the result on, as `attend`'s option ``schedule``.
    (In a loop that is unrolled XLA finds the same computation in every layer, and runs it once.)

    Args:
        batch: the step's packing.
        cache: the pages, before or after they were written.
        num_q_heads: query heads.
        dtype: of the queries that `attend` will be given.
        **options: for `paged_attention`, those of `attend`: ``sliding_window``,
            ``implementation``, ...
    """
    shape = (*batch.positions.shape, num_q_heads, cache.head_dim)
    return attention_schedule(
        jax.ShapeDtypeStruct(shape, cache.query_dtype(dtype)),
        cache.k_pages,
        cache.v_pages,
        k_scales=cache.k_scales,
        v_scales=cache.v_scales,
        block_tables=batch.block_tables,
        kv_lens=batch.kv_lens,
        cu_q_lens=batch.cu_q_lens,
        layer=0,
        max_q_len=batch.max_q_len,
        ancestors=batch.ancestors,
        num_kv_heads=cache.num_kv_heads,
        **options,
    )


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis (arXiv:1910.07467).

    Computed in float32, returned in x's dtype.
    """
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def attend_heads(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Any,
    batch: RaggedBatch,
    *,
    layer: jax.Array | int,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    norm_eps: float = 1e-6,
    rotate: Callable[[jax.Array], jax.Array] | None = None,
    attend: Callable[..., tuple[jax.Array, Any]] = attend,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """From a layer's projections to its attention output: norms and rotation, then `attend`.

    Args:
        q: ``[T, num_q_heads, head_dim]``.
        k: ``[T, num_kv_heads, head_dim]``.
        v: the same shape as ``k``.
        cache: what ``attend`` takes.
        batch: the step's packing.
        layer: which layer, an integer or i32[].
        q_norm: ``[head_dim]``, weight of the queries' RMS norm; None for no norm.
        k_norm: the keys'.
        norm_eps: added to the mean square in those.
        rotate: position embedding of ``[T, H, head_dim]`` heads; None for none.
        attend: replaces the paged `attend` (to compare with another cache).
        **options: for `paged_attention`.

    Returns:
        (``[T, num_q_heads, head_dim]``, cache).
    """
    if q_norm is not None:
        q = rms_norm(q, q_norm, norm_eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, norm_eps)
    if rotate is not None:
        q, k = rotate(q), rotate(k)
    return attend(q, k, v, cache, batch, layer=layer, **options)


class PagedAttention(nnx.Module):
    """Causal self-attention over a paged cache: a layer for any Flax NNX model.

    Example::

        attention = PagedAttention(512, 8, num_kv_heads=4, rngs=nnx.Rngs(0))
        y, cache = attention(x, cache, batch, layer=0)

    Args:
        hidden_size: width E of the model.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of ``num_heads``; as many by default.
        head_dim: elements per head; ``hidden_size / num_heads`` by default.
        qkv_bias: the query, key and value projections have a bias.
        out_bias: the output projection has one.
        rope: a `Rope`, any function ``(x[T, H, head_dim], positions[T]) -> x``, or None for no
            rotary embedding; ``Rope()``, with a base of 10,000, by default.
        qk_norm: RMS-normalise queries and keys per head, before the rotation.
        norm_eps: added to the mean square in that.
        sliding_window: a token sees the last ``sliding_window`` tokens, itself included.
        soft_cap: logits become ``soft_cap * tanh(logits / soft_cap)``.
        sm_scale: factor on the logits; ``head_dim ** -0.5`` by default.
        sinks: learn one logit per query head that joins the softmax's denominator.
        implementation: which attention implementation; None for the best there is.
        fixed_split: as in `paged_attention`: no bit of a row's result depends on other rows.
        dtype: computation dtype; that of input and parameters promoted by default.
        param_dtype: dtype of the parameters.
        rngs: for their initial values.

    Raises:
        ValueError: sizes that do not go together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        rope: Rope | Callable[[jax.Array, jax.Array], jax.Array] | None = Rope(),  # noqa: B008
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sm_scale: float | None = None,
        sinks: bool = False,
        implementation: str | tuple[str, ...] | None = None,
        fixed_split: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden_size = check_positive("hidden_size", hidden_size)
        num_heads = check_positive("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        num_kv_heads = check_positive("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"{hidden_size=} is no multiple of {num_heads=}: pass head_dim")
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        head_dim = check_positive("head_dim", head_dim)
        if isinstance(rope, Rope) and head_dim % 2:
            raise ValueError(f"{head_dim=} must be even: rotary embedding rotates pairs")

        def linear(size_in: int, size_out: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(
                size_in, size_out, use_bias=bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.q_proj = linear(hidden_size, num_heads * head_dim, qkv_bias)
        self.k_proj = linear(hidden_size, num_kv_heads * head_dim, qkv_bias)
        self.v_proj = linear(hidden_size, num_kv_heads * head_dim, qkv_bias)
        self.o_proj = linear(num_heads * head_dim, hidden_size, out_bias)
        self.q_norm = nnx.Param(jnp.ones(head_dim, param_dtype)) if qk_norm else None
        self.k_norm = nnx.Param(jnp.ones(head_dim, param_dtype)) if qk_norm else None
        self.sinks = nnx.Param(jnp.zeros(num_heads, jnp.float32)) if sinks else None
        self.head_dim = head_dim
        self.norm_eps = norm_eps
        self.rope = rope
        self.sliding_window = sliding_window
        self.soft_cap = soft_cap
        self.sm_scale = sm_scale
        self.implementation = implementation
        self.fixed_split = fixed_split

    def __call__(
        self,
        x: jax.Array,
        cache: KVCache,
        batch: RaggedBatch,
        layer: jax.Array | int,
        schedule: AttentionSchedule | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Attend.

        Args:
            x: ``[T, E]``, the step's packed tokens.
            cache: pages of all layers.
            batch: the step's packing.
            layer: which layer of the cache is this one's, an integer or i32[].
            schedule: from `schedule_attention`, if this layer runs inside a scan.

        Returns:
            (``[T, E]``, the cache with the new tokens in it).

        Raises:
            ValueError: x has another shape.
        """
        rope, positions = self.rope, batch.positions
        wanted = (positions.size, self.q_proj.in_features)
        if x.shape != wanted:
            raise ValueError(
                f"{x.shape=} must be {wanted}: the batch's packed tokens without a batch axis, and "
                "hidden_size"
            )
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).reshape(x.shape[0], -1, self.head_dim) for proj in projections)
        out, cache = attend_heads(
            q,
            k,
            v,
            cache,
            batch,
            layer=layer,
            q_norm=None if self.q_norm is None else self.q_norm[...],
            k_norm=None if self.k_norm is None else self.k_norm[...],
            norm_eps=self.norm_eps,
            rotate=None if rope is None else lambda heads: rope(heads, positions),
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
            sm_scale=self.sm_scale,
            sinks=None if self.sinks is None else self.sinks[...],
            implementation=self.implementation,
            fixed_split=self.fixed_split if schedule is None else None,
            schedule=schedule,
        )
        return self.o_proj(out.reshape(x.shape[0], -1)), cache
