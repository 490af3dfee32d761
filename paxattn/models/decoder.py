"""A decoder-only transformer over a paged cache, for the families that `families` lists.

Layers run in one ``lax.scan`` that carries the residual stream and the cache, so compile time does
not grow with depth; what differs between families is data. Where a layer's matrices lie depends on
the machine:

- *stacked*, ``[num_layers, out..., in]``, which the scan slices: for accelerators. XLA hands the
  slices that a scan makes to cuBLAS in place, but copies those made by an index, and copies either
  for its Triton products (read from programs compiled for an H200; with
  ``XLA_FLAGS=--xla_gpu_enable_triton_gemm=false`` an 8B decode step copies no matrix);
- *separate*, ``num_layers`` arrays ``[out..., in]``, chosen among by ``lax.switch``: for CPUs,
  where XLA copies a slice before each product, which doubles the time of a decode step.

`weights.project` is the one place that knows. Experts' matrices are always stacked, and never
sliced by the scan: which of them are read is up to the tokens (see `experts`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from paxattn.kv_cache import KVCache, init_kv_cache
from paxattn.models.decoder_config import DecoderConfig
from paxattn.models.experts import mix_experts
from paxattn.models.weights import (
    Kernel,
    Weights,
    expert_shapes,
    kernel_shapes,
    model_shapes,
    product,
    project,
    random_weights,
    stack_layers,
    vector_shapes,
)
from paxattn.nn import attend as paged_attend
from paxattn.nn import attend_heads, rms_norm, schedule_attention
from paxattn.ragged import RaggedBatch
from paxattn.rope import rotate

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class Decoder(nnx.Module):
    """The model: tokens to hidden states, hidden states to logits.

    It holds parameters only; the cache is passed through. Give it to ``jax.jit`` as an argument.
    It computes in the dtype of its weights (norms, rotation and accumulation in float32).

    Attributes:
        config: its `DecoderConfig` (static).
        implementation: which attention implementation, None for the best there is (static; may be
            set after loading).
        fixed_split: as in `paged_attention`: no bit of a sequence's attention depends on what else
            is in the batch (static; may be set after loading).
        embed: ``[vocab_size, hidden_size]``.
        kernels: name to a Param ``[num_layers, out..., in]``, or to a tuple of as many Params
            ``[out..., in]``; see `weights.kernel_shapes`.
        experts: name to a Param ``[num_layers, num_experts, out..., in]``; see
            `weights.expert_shapes`. Empty for most families.
        vectors: name to a Param ``[num_layers, ...]``: norms, biases and sinks; see
            `weights.vector_shapes`.
        norm: ``[hidden_size]``, the final norm.
        head: ``[vocab_size, hidden_size]``; None when tied to the embedding.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: DTypeLike = jnp.float32,
        stacked: bool | None = None,
        weights: Weights | None = None,
        implementation: str | tuple[str, ...] | None = None,
        fixed_split: int | None = None,
    ):
        """Make a decoder with random weights, or with given ones.

        Args:
            config: its shape and options.
            rngs: for random weights.
            dtype: of the weights, f32, bf16 or f16.
            stacked: how the layers' matrices are stored (see the module's docstring); None
                chooses by ``jax.default_backend()``.
            weights: ``weights(name, layer, shape)`` gives each array, in ``dtype``, one at a time;
                instead of ``rngs``.
            implementation: of attention, as in `paged_attention`.
            fixed_split: same.

        Raises:
            ValueError: neither or both of ``rngs`` and ``weights``, or an unsuitable dtype.
        """
        dtype = jnp.dtype(dtype)
        if dtype.name not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype.name} must be float32, bfloat16 or float16")
        if weights is None and rngs is not None:
            weights, rngs = random_weights(rngs, dtype), None
        if weights is None or rngs is not None:
            raise ValueError("pass either rngs=nnx.Rngs(seed) for random weights, or weights=")
        stacked = jax.default_backend() != "cpu" if stacked is None else stacked
        layers = range(config.num_layers)

        def store(name: str, shape: tuple[int, ...]) -> nnx.Param | tuple[nnx.Param, ...]:
            if not stacked:
                return tuple(nnx.Param(jnp.asarray(weights(name, i, shape))) for i in layers)
            return stack_layers(weights, name, config.num_layers, shape, dtype)

        def store_vector(name: str, shape: tuple[int, ...]) -> nnx.Param:
            return nnx.Param(jnp.asarray(np.stack([weights(name, i, shape) for i in layers])))

        self.config = config
        self.implementation = implementation
        self.fixed_split = fixed_split
        once = {
            name: nnx.Param(jnp.asarray(weights(name, None, shape)))
            for name, shape in model_shapes(config).items()
        }
        self.embed, self.norm, self.head = once["embed"], once["norm"], once.get("head")
        kernels = {name: store(name, shape) for name, shape in kernel_shapes(config).items()}
        self.kernels = nnx.data(kernels)
        self.experts = nnx.data(
            {
                name: stack_layers(weights, name, config.num_layers, shape, dtype)
                for name, shape in expert_shapes(config).items()
            }
        )
        vectors = {name: store_vector(name, shape) for name, shape in vector_shapes(config).items()}
        self.vectors = nnx.data(vectors)

    def init_cache(
        self, *, num_pages: int, page_size: int, dtype: DTypeLike | None = None
    ) -> KVCache:
        """Allocate a cache of this model's shape, in its weights' dtype unless told otherwise."""
        return init_kv_cache(
            num_layers=self.config.num_layers,
            num_pages=num_pages,
            page_size=page_size,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.embed[...].dtype if dtype is None else dtype,
        )

    def __call__(
        self,
        tokens: jax.Array,
        batch: RaggedBatch,
        cache: Any,
        attend: Callable[..., tuple[jax.Array, Any]] = paged_attend,
    ) -> tuple[jax.Array, Any]:
        """Run one ragged step through all layers.

        Args:
            tokens: i32[T], packed as ``batch`` says. Padding may hold any number: ids are clipped
                to the vocabulary.
            batch: the step's packing.
            cache: a `KVCache` with this model's layers, heads and head_dim (`init_cache`), or
                whatever ``attend`` takes.
            attend: replaces `nn.attend`, to compare with another cache.

        Returns:
            (final hidden states ``[T, hidden_size]``, normalised and ready for `logits`; cache).

        Raises:
            ValueError: shapes that do not go together.
        """
        config = self.config
        if tokens.shape != batch.positions.shape:
            raise ValueError(f"{tokens.shape=} must be {batch.positions.shape=}, the batch's")
        if isinstance(cache, KVCache):
            self._check_cache(cache)
        separate: dict[str, Kernel] = {}
        stacked: dict[str, Kernel] = {}
        for name, kernel in self.kernels.items():
            if isinstance(kernel, tuple):
                separate[name] = tuple(one[...] for one in kernel)
            else:
                stacked[name] = kernel[...]
        experts = {name: stack[...] for name, stack in self.experts.items()}
        live = batch.rows < batch.kv_lens.size
        of_kind, kinds = self._kinds(batch, cache, attend)

        def layer_step(carry: tuple[jax.Array, Any], per_layer: Any) -> tuple[Any, None]:
            x, cache = carry
            layer, vectors, kind, own = per_layer
            kernels: dict[str, Kernel] = separate | own

            def norm(x: jax.Array, name: str) -> jax.Array:
                weight = vectors.get(name)
                return x if weight is None else rms_norm(x, weight, config.norm_eps)

            def linear(x: jax.Array, name: str) -> jax.Array:
                return project(x, kernels[name], layer, vectors.get(f"{name}_bias"))

            qkv = linear(norm(x, "attention_norm"), "qkv")  # [T, num_kv_heads, group + 2, head_dim]
            options, (cos, sin) = of_kind(kind)
            if config.sinks:
                options["sinks"] = vectors["sinks"]
            out, cache = attend_heads(
                qkv[:, :, :-2].reshape(-1, config.num_heads, config.head_dim),
                qkv[:, :, -2],
                qkv[:, :, -1],
                cache,
                batch,
                layer=layer,
                q_norm=vectors.get("q_norm"),
                k_norm=vectors.get("k_norm"),
                norm_eps=config.norm_eps,
                rotate=partial(rotate, cos=cos, sin=sin),
                attend=attend,
                **options,
            )
            out = linear(out.reshape(x.shape[0], -1), "o")
            x = x + norm(out, "attention_out_norm")
            h = norm(x, "mlp_norm")
            if config.experts is None:
                gate_up = linear(h, "gate_up")  # [T, 2, intermediate_size]
                h = _ACTIVATIONS[config.activation](gate_up[:, 0]) * gate_up[:, 1]
                h = linear(h, "down")
            else:
                logits = linear(h, "router")
                h = mix_experts(h, logits, live, experts, vectors, layer, config.experts)
            x = x + norm(h, "mlp_out_norm")
            return (x, cache), None

        layers = jnp.arange(config.num_layers, dtype=jnp.int32)
        vectors = {name: vector[...] for name, vector in self.vectors.items()}
        (x, cache), _ = lax.scan(
            layer_step, (self._embed(tokens), cache), (layers, vectors, kinds, stacked)
        )
        return rms_norm(x, self.norm[...], config.norm_eps), cache

    def _embed(self, tokens: jax.Array) -> jax.Array:
        x = jnp.take(self.embed[...], tokens, axis=0, mode="clip")
        if not self.config.scale_embeddings:
            return x
        # The factor is rounded first, as in transformers.
        return x * jnp.asarray(np.float32(self.config.hidden_size**0.5), x.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits, f32[K, vocab_size], of hidden states ``[K, hidden_size]``.

        Only the tokens that something is to be predicted from need to be passed: of a prompt, the
        last one.
        """
        head = self.embed if self.head is None else self.head
        logits = product(hidden, head[...])
        cap = self.config.final_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _kinds(
        self, batch: RaggedBatch, cache: Any, attend: Callable
    ) -> tuple[Callable[[jax.Array | None], tuple[dict[str, Any], Any]], jax.Array | None]:
        """What layers have in common by kind, and the layers' kinds, i32[num_layers].

        Layers with the same sliding window are of a kind. They share the options for ``attend``,
        with the schedule of the step, and the rotation's angles, (cos, sin).
        """
        config = self.config
        windows = sorted(set(config.windows)) or [0]
        given = dict(sm_scale=config.sm_scale, soft_cap=config.soft_cap)
        common = {name: value for name, value in given.items() if value is not None}

        def in_common(window: int) -> tuple[dict[str, Any], Any]:
            rope = config.local_rope if window and config.local_rope else config.rope
            # One window for all layers stays a Python number, which a kernel may build upon.
            alone = len(windows) == 1
            options: dict[str, Any] = dict(
                sliding_window=(window or None) if alone else jnp.int32(window)
            )
            if attend is paged_attend:
                options["schedule"] = schedule_attention(
                    batch,
                    cache,
                    num_q_heads=config.num_heads,
                    dtype=self.embed[...].dtype,
                    implementation=self.implementation,
                    fixed_split=self.fixed_split,
                    **common,
                    **options,
                )
            return options, rope.angles(batch.positions, config.head_dim)

        each = [in_common(window) for window in windows]
        if len(each) == 1:
            (options, angles), *_ = each
            return lambda kind: ({**common, **options}, angles), None
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        pick = partial(lax.dynamic_index_in_dim, keepdims=False)
        of_layer = jnp.asarray([windows.index(window) for window in config.windows], jnp.int32)

        def of_kind(kind: jax.Array | None) -> tuple[dict[str, Any], Any]:
            options, angles = jax.tree.map(lambda x: pick(x, kind), stacked)
            return {**common, **options}, angles

        return of_kind, of_layer

    def _check_cache(self, cache: KVCache) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            found, expected = getattr(cache, name), getattr(self.config, name)
            if found != expected:
                raise ValueError(
                    f"the cache has {name}={found}, the model {expected}: make it with "
                    "decoder.init_cache(num_pages=..., page_size=...)"
                )
