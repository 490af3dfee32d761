"""A decoder-only transformer over a paged cache: Llama, Mistral, Qwen2 and Qwen3.

Layers run in one ``lax.scan`` that carries the residual stream and the cache, so compile time does
not grow with depth. Where a layer's matrices lie depends on the machine:

- *stacked*, ``[num_layers, out..., in]``, which the scan slices: for accelerators. XLA hands the
  slices that a scan makes to cuBLAS in place, but copies those made by an index, and copies either
  for its Triton products (read from programs compiled for an H200; with
  ``XLA_FLAGS=--xla_gpu_enable_triton_gemm=false`` an 8B decode step copies no matrix);
- *separate*, ``num_layers`` arrays ``[out..., in]``, chosen among by ``lax.switch``: for CPUs,
  where XLA copies a slice before each product, which doubles the time of a decode step.

`project` is the one place that knows. The input's axis comes last, as in Hugging Face checkpoints:
nothing is transposed on loading, and on a CPU the product of few rows is faster that way round.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from paxattn.kv_cache import KVCache, init_kv_cache
from paxattn.models.config import DecoderConfig
from paxattn.nn import attend as paged_attend
from paxattn.nn import attend_heads, rms_norm, schedule_attention
from paxattn.ragged import RaggedBatch
from paxattn.rope import rotate

Kernel = jax.Array | tuple[jax.Array, ...]
# weights(name, layer, shape) -> array; layer is None for what the model has once.
Weights = Callable[[str, int | None, tuple[int, ...]], jax.Array | np.ndarray]


def kernel_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Matrices of one layer, by name: (out..., in).

    Those with the same input are one. ``qkv`` is grouped by KV head: its query heads, its key, its
    value. ``gate_up`` is both halves of the MLP's first step. Fewer, larger products; and a mesh
    can shard ``qkv`` over KV heads and ``gate_up`` over its second axis.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    group = config.num_heads // config.num_kv_heads
    return {
        "qkv": (config.num_kv_heads, group + 2, config.head_dim, hidden),
        "o": (hidden, config.num_heads * config.head_dim),
        "gate_up": (2, inner, hidden),
        "down": (hidden, inner),
    }


def vector_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Norms and biases of one layer, by name."""
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (config.hidden_size,),
        "mlp_norm": (config.hidden_size,),
    }
    if config.qkv_bias:
        shapes["qkv_bias"] = kernel_shapes(config)["qkv"][:-1]
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    return shapes


def model_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Arrays that the model has once, by name."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"embed": table, "norm": (config.hidden_size,)}
    return shapes if config.tie_embeddings else shapes | {"head": table}


def random_weights(rngs: nnx.Rngs, dtype: np.dtype) -> Weights:
    """Initial values: matrices normal with variance 1 / in, norms one, biases zero."""
    key = rngs.params()

    def weights(name: str, layer: int | None, shape: tuple[int, ...]) -> jax.Array | np.ndarray:
        if name.endswith(("norm", "bias")):
            return np.full(shape, name.endswith("norm"), dtype)
        place = zlib.crc32(f"{name}.{layer}".encode())
        return _normal(key, np.uint32(place), shape, dtype)

    return weights


@partial(jax.jit, static_argnums=(2, 3))
def _normal(key: jax.Array, place: ArrayLike, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    key = jax.random.fold_in(key, place)
    return (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(dtype)


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, array: jax.Array) -> jax.Array:
    # Not stack.at[layer].set: XLA's scatter widens a whole bf16 stack to f32 on some CPUs.
    return lax.dynamic_update_index_in_dim(stack, array, layer, axis=0)


# Up to so many tokens a CPU multiplies faster with the large matrix on the left (measured).
_FEW_TOKENS = 16


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a[m, in]`` and ``b[n, in]`` to ``[m, n]``, accumulated in float32."""
    contract_last = (((1,), (1,)), ((), ()))
    return lax.dot_general(a, b, contract_last, preferred_element_type=jnp.float32)


def _flat(kernel: jax.Array) -> jax.Array:
    """``[out..., in]`` to ``[out, in]``: of more axes XLA's CPU backend makes a transposed copy."""
    return kernel.reshape(-1, kernel.shape[-1])


def project(x: jax.Array, kernel: Kernel, layer: jax.Array) -> jax.Array:
    """Multiply by one layer's matrix, in whichever storage.

    Args:
        x: ``[T, in]``.
        kernel: ``[out..., in]``, the layer's own, or a tuple of those of all layers.
        layer: i32[], which one.

    Returns:
        ``[T, out...]`` in x's dtype.
    """
    if isinstance(kernel, tuple):
        shape = kernel[0].shape[:-1]
        few = x.shape[0] <= _FEW_TOKENS
        branches = [
            lambda x, one=one: _product(_flat(one), x) if few else _product(x, _flat(one))
            for one in kernel
        ]
        out = lax.switch(layer, branches, x)
        # Out here, where XLA cannot turn the product round again.
        out = out.T if few else out
    else:
        shape = kernel.shape[:-1]
        out = _product(x, _flat(kernel))
    return out.reshape(-1, *shape).astype(x.dtype)


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
            ``[out..., in]``; see `kernel_shapes`.
        vectors: name to a Param ``[num_layers, ...]``: norms and biases; see `vector_shapes`.
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
            # Filled in place, so that no second copy of the stack ever exists.
            stack = jnp.zeros((config.num_layers, *shape), dtype)
            for layer in layers:
                stack = _set_layer(stack, np.int32(layer), weights(name, layer, shape))
            return nnx.Param(stack)

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
        x = jnp.take(self.embed[...], tokens, axis=0, mode="clip")
        cos, sin = config.rope.angles(batch.positions, config.head_dim)
        stacked: dict[str, Kernel] = {}
        separate: dict[str, Kernel] = {}
        for name, kernel in self.kernels.items():
            if isinstance(kernel, tuple):
                separate[name] = tuple(one[...] for one in kernel)
            else:
                stacked[name] = kernel[...]
        attend_options, kinds = self._attend_options(batch, cache, attend)

        def layer_step(carry: tuple[jax.Array, Any], per_layer: Any) -> tuple[Any, None]:
            x, cache = carry
            layer, vectors, kind, own = per_layer
            kernels: dict[str, Kernel] = separate | own

            h = rms_norm(x, vectors["attention_norm"], config.norm_eps)
            qkv = project(h, kernels["qkv"], layer)  # [T, num_kv_heads, group + 2, head_dim]
            if config.qkv_bias:
                qkv = qkv + vectors["qkv_bias"]
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
                **attend_options(kind),
            )
            x = x + project(out.reshape(x.shape[0], -1), kernels["o"], layer)
            h = rms_norm(x, vectors["mlp_norm"], config.norm_eps)
            gate_up = project(h, kernels["gate_up"], layer)  # [T, 2, intermediate_size]
            h = jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]
            x = x + project(h, kernels["down"], layer)
            return (x, cache), None

        layers = jnp.arange(config.num_layers, dtype=jnp.int32)
        vectors = {name: vector[...] for name, vector in self.vectors.items()}
        (x, cache), _ = lax.scan(layer_step, (x, cache), (layers, vectors, kinds, stacked))
        return rms_norm(x, self.norm[...], config.norm_eps), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits, f32[K, vocab_size], of hidden states ``[K, hidden_size]``.

        Only the tokens that something is to be predicted from need to be passed: of a prompt, the
        last one.
        """
        head = self.embed if self.head is None else self.head
        return _product(hidden, head[...])

    def _attend_options(
        self, batch: RaggedBatch, cache: Any, attend: Callable
    ) -> tuple[Callable[[jax.Array | None], dict[str, Any]], jax.Array | None]:
        """Options for ``attend`` by kind of layer, and the layers' kinds, i32[num_layers].

        Layers with the same sliding window are of a kind, and share the schedule of the step.
        """
        kinds = sorted(set(self.config.windows)) or [0]

        def options(window: ArrayLike | None) -> dict[str, Any]:
            options: dict[str, Any] = dict(sliding_window=window)
            if attend is paged_attend:
                options["schedule"] = schedule_attention(
                    batch,
                    cache,
                    num_q_heads=self.config.num_heads,
                    dtype=self.embed[...].dtype,
                    implementation=self.implementation,
                    fixed_split=self.fixed_split,
                    **options,
                )
            return options

        if len(kinds) == 1:
            # One window for all layers stays a Python number, which a kernel may build upon.
            common = options(kinds[0] or None)
            return lambda kind: common, None
        each = [options(window) for window in jnp.asarray(kinds, jnp.int32)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        pick = partial(lax.dynamic_index_in_dim, keepdims=False)
        of_layer = jnp.asarray([kinds.index(window) for window in self.config.windows], jnp.int32)
        return lambda kind: jax.tree.map(lambda x: pick(x, kind), stacked), of_layer

    def _check_cache(self, cache: KVCache) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            found, expected = getattr(cache, name), getattr(self.config, name)
            if found != expected:
                raise ValueError(
                    f"the cache has {name}={found}, the model {expected}: make it with "
                    "decoder.init_cache(num_pages=..., page_size=...)"
                )
