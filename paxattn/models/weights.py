"""The decoder's weights: their names and shapes, initial values, storage, and the products.

The input's axis comes last, as in most of Hugging Face's tensors: nothing is transposed on loading,
and on a CPU the product of few rows is faster that way round.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import ArrayLike

from paxattn.models.decoder_config import DecoderConfig

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
    shapes: dict[str, tuple[int, ...]] = {
        "qkv": (config.num_kv_heads, group + 2, config.head_dim, hidden),
        "o": (hidden, config.num_heads * config.head_dim),
    }
    if config.experts is not None:
        return shapes | {"router": (config.experts.num_experts, hidden)}
    return shapes | {"gate_up": (2, inner, hidden), "down": (hidden, inner)}


def expert_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Matrices of one layer's experts, by name: (experts, out..., in); see `experts`.

    Rows of gate and up alternate, as they do in checkpoints.
    """
    if config.experts is None:
        return {}
    num, hidden, inner = config.experts.num_experts, config.hidden_size, config.intermediate_size
    return {"expert_gate_up": (num, inner, 2, hidden), "expert_down": (num, hidden, inner)}


def vector_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Norms, biases and sinks of one layer, by name."""
    hidden = (config.hidden_size,)
    shapes: dict[str, tuple[int, ...]] = {"attention_norm": hidden, "mlp_norm": hidden}
    kernels = kernel_shapes(config) | expert_shapes(config)
    biased = [] if config.experts is None else ["router", "expert_gate_up", "expert_down"]
    biased += ["qkv"] * config.qkv_bias + ["o"] * config.o_bias
    shapes |= {f"{name}_bias": kernels[name][:-1] for name in biased}
    if config.out_norms:
        shapes |= {"attention_out_norm": hidden, "mlp_out_norm": hidden}
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.sinks:
        shapes["sinks"] = (config.num_heads,)
    return shapes


def model_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Arrays that the model has once, by name."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"embed": table, "norm": (config.hidden_size,)}
    return shapes if config.tie_embeddings else shapes | {"head": table}


def random_weights(rngs: nnx.Rngs, dtype: np.dtype) -> Weights:
    """Initial values: matrices normal with variance 1 / in, norms one, biases and sinks zero."""
    key = rngs.params()

    def weights(name: str, layer: int | None, shape: tuple[int, ...]) -> jax.Array | np.ndarray:
        if name.endswith(("norm", "bias", "sinks")):
            return np.full(shape, name.endswith("norm"), dtype)
        place = zlib.crc32(f"{name}.{layer}".encode())
        return _normal(key, np.uint32(place), shape, dtype)

    return weights


@partial(jax.jit, static_argnums=(2, 3))
def _normal(key: jax.Array, place: ArrayLike, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    key = jax.random.fold_in(key, place)
    return (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(dtype)


def stack_layers(
    weights: Weights, name: str, num_layers: int, shape: tuple[int, ...], dtype: np.dtype
) -> nnx.Param:
    """All layers' arrays of a name in one, filled in place: no second copy ever exists."""
    stack = jnp.zeros((num_layers, *shape), dtype)
    for layer in range(num_layers):
        stack = _set_layer(stack, np.int32(layer), weights(name, layer, shape))
    return nnx.Param(stack)


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, array: jax.Array) -> jax.Array:
    # Not stack.at[layer].set: XLA's scatter widens a whole bf16 stack to f32 on some CPUs.
    return lax.dynamic_update_index_in_dim(stack, array, layer, axis=0)


# Up to so many tokens a CPU multiplies faster with the large matrix on the left (measured).
_FEW_TOKENS = 16


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a[m, in]`` and ``b[n, in]`` to ``[m, n]``, accumulated in float32."""
    contract_last = (((1,), (1,)), ((), ()))
    return lax.dot_general(a, b, contract_last, preferred_element_type=jnp.float32)


def flat(kernel: jax.Array) -> jax.Array:
    """``[out..., in]`` to ``[out, in]``: of more axes XLA's CPU backend makes a transposed copy."""
    return kernel.reshape(-1, kernel.shape[-1])


def project(
    x: jax.Array, kernel: Kernel, layer: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Multiply by one layer's matrix, in whichever storage.

    Args:
        x: ``[T, in]``.
        kernel: ``[out..., in]``, the layer's own, or a tuple of those of all layers.
        layer: i32[], which one.
        bias: ``[out...]``, the layer's, or None.

    Returns:
        ``[T, out...]`` in x's dtype.
    """
    if isinstance(kernel, tuple):
        shape = kernel[0].shape[:-1]
        few = x.shape[0] <= _FEW_TOKENS
        branches = [
            lambda x, one=one: product(flat(one), x) if few else product(x, flat(one))
            for one in kernel
        ]
        out = lax.switch(layer, branches, x)
        # Out here, where XLA cannot turn the product round again.
        out = out.T if few else out
    else:
        shape = kernel.shape[:-1]
        out = product(x, flat(kernel))
    out = out.reshape(-1, *shape).astype(x.dtype)
    return out if bias is None else out + bias
