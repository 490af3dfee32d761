"""The decoder's arrays from the tensors of a Hugging Face checkpoint: names, shapes, joins."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from jax.typing import DTypeLike

from paxattn.models import mxfp4
from paxattn.models.decoder import Decoder
from paxattn.models.decoder_config import DecoderConfig
from paxattn.models.families import FAMILIES
from paxattn.models.fields import CheckpointError
from paxattn.models.tensors import TensorFiles
from paxattn.models.weights import expert_shapes, kernel_shapes, model_shapes, vector_shapes

Progress = Callable[[int, int], None]
"""``progress(bytes_read, bytes_total)``."""
Shape = tuple[int, ...]

# The decoder's names: those in the file, joined along the second axis where there are several.
_ONCE = {
    "embed": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
}
_IN_LAYER = {
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "o": ("self_attn.o_proj.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
    "router": ("mlp.router.weight",),
    "expert_gate_up": ("mlp.experts.gate_up_proj",),
    "expert_down": ("mlp.experts.down_proj",),
    "attention_norm": ("input_layernorm.weight",),
    "mlp_norm": ("post_attention_layernorm.weight",),
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "o_bias": ("self_attn.o_proj.bias",),
    "router_bias": ("mlp.router.bias",),
    "expert_gate_up_bias": ("mlp.experts.gate_up_proj_bias",),
    "expert_down_bias": ("mlp.experts.down_proj_bias",),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "sinks": ("self_attn.sinks",),
}
# Where a layer has four norms, one of two has another place.
_FOUR_NORMS = {
    "attention_out_norm": ("post_attention_layernorm.weight",),
    "mlp_norm": ("pre_feedforward_layernorm.weight",),
    "mlp_out_norm": ("post_feedforward_layernorm.weight",),
}
# A decoder inside a larger model: what its names begin with, by version of transformers.
_PREFIXES = (
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
)
# Stored by older versions of transformers, computed here; and parts for other inputs than text.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_NOT_TEXT = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.")


def read_model(
    files: TensorFiles,
    config: DecoderConfig,
    dtype: DTypeLike | None,
    stacked: bool | None,
    progress: Progress | None,
) -> Decoder:
    """Check the inventory, then build the decoder array by array.

    Args:
        files: the checkpoint's.
        config: what it should have.
        dtype: of the weights; None: what the config says, or else what the embedding has.
        stacked: as in `Decoder`.
        progress: called as arrays are read.

    Raises:
        CheckpointError: tensors are missing, unexpected, or unsuitable.
        ValueError: an unsuitable dtype.
    """
    if config.num_layers > len(files.shapes):  # before as many names are made up
        raise CheckpointError(
            f"{files.directory}: has {len(files.shapes)} tensors, but config.json says "
            f"num_hidden_layers={config.num_layers}; check config.json against the checkpoint"
        )
    names = _Names(files, config)
    shapes: dict[str, Shape] = {}
    for name, shape in model_shapes(config).items():
        shapes |= names.tensors(name, None, shape)
    in_layer = kernel_shapes(config) | expert_shapes(config) | vector_shapes(config)
    for layer in range(config.num_layers):
        for name, shape in in_layer.items():
            shapes |= names.tensors(name, layer, shape)
    embed, head = (names.files(name, None)[0] for name in ("embed", "head"))
    files.forget([name for name in files.shapes if names.ignored(name)])
    if config.tie_embeddings and head in files.shapes:
        files.check(shapes | {head: shapes[embed]})
        _check_tied(files, head, embed)
    else:
        files.check(shapes)
    target = _weight_dtype(dtype, config.dtype or files.dtype(embed))
    total, done = sum(map(files.size, shapes)), 0
    offset = np.float32(FAMILIES[config.family].norm_offset)

    def weights(name: str, layer: int | None, shape: Shape) -> np.ndarray:
        nonlocal done
        tensors = names.tensors(name, layer, shape)
        read = {one: files.read(one) for one in tensors}
        done += sum(map(files.size, tensors))
        if progress is not None:
            progress(done, total)
        if any(one.endswith("_blocks") for one in tensors):
            return _unpack(read, target, shape)
        parts = [_convert(array, target, one) for one, array in read.items()]
        if offset and name.endswith("norm"):
            # Added in float32 and kept so, as transformers computes it.
            return parts[0].astype(np.float32) + offset
        return _join(name, parts, shape)

    return Decoder(config, dtype=target, stacked=stacked, weights=weights)


class _Names:
    """Which tensors make up which of the decoder's arrays."""

    def __init__(self, files: TensorFiles, config: DecoderConfig):
        self.present = files.shapes
        self.in_layer = _IN_LAYER | (_FOUR_NORMS if config.out_norms else {})
        self.model, self.head = "model.", "lm_head."
        self.nested = FAMILIES[config.family].part is not None
        if self.nested:
            (embed,) = _ONCE["embed"]
            found = [p for p in _PREFIXES if embed.replace("model.", p[0], 1) in self.present]
            self.model, self.head = (found or _PREFIXES)[0]

    def ignored(self, name: str) -> bool:
        """Whether a tensor is of no use here."""
        return bool(_IGNORED.search(name) or (self.nested and _NOT_TEXT.search(name)))

    def files(self, name: str, layer: int | None) -> list[str]:
        """The tensors' names, before packing."""
        if layer is not None:
            return [f"{self.model}layers.{layer}.{suffix}" for suffix in self.in_layer[name]]
        own, theirs = ("lm_head.", self.head) if name == "head" else ("model.", self.model)
        return [one.replace(own, theirs, 1) for one in _ONCE[name]]

    def tensors(self, name: str, layer: int | None, shape: Shape) -> dict[str, Shape]:
        """The tensors that make up an array, with their shapes in the file."""
        names = self.files(name, layer)
        if name.startswith("qkv"):
            kv_heads, group_and_two, head_dim, *rest = shape
            rows = [kv_heads * count * head_dim for count in (group_and_two - 2, 1, 1)]
            return {one: (size, *rest) for one, size in zip(names, rows, strict=True)}
        if not name.startswith("expert_"):
            return dict.fromkeys(names, shape[-2:])
        (one,) = names
        if name.endswith("bias"):
            return {one: (shape[0], int(np.prod(shape[1:])))}
        num, size_out, size_in = shape[0], int(np.prod(shape[1:-1])), shape[-1]
        if f"{one}_blocks" not in self.present:
            return {one: (num, size_in, size_out)}
        packed = (num, size_out, -(-size_in // mxfp4.BLOCK))
        return {f"{one}_blocks": (*packed, mxfp4.BLOCK // 2), f"{one}_scales": packed}


def _join(name: str, parts: list[np.ndarray], shape: Shape) -> np.ndarray:
    """The decoder's array from the file's."""
    if name.startswith("qkv"):  # by KV head: its queries, its key, its value
        kv_heads, _, *rest = shape
        return np.concatenate([part.reshape(kv_heads, -1, *rest) for part in parts], axis=1)
    if name in ("expert_gate_up", "expert_down"):  # alone in having the input's axis first
        parts = [part.swapaxes(1, 2) for part in parts]
    return np.stack(parts) if len(parts) > 1 else parts[0].reshape(shape)


def _unpack(parts: dict[str, np.ndarray], dtype: np.dtype, shape: Shape) -> np.ndarray:
    """The decoder's array from blocks and scales, expert by expert."""
    blocks, scales = parts.values()
    name, out = next(iter(parts)), np.empty(shape, dtype)
    for i in range(len(out)):
        one = mxfp4.dequantize(blocks[i], scales[i])
        out[i] = _convert(one, dtype, name).reshape(shape[1:])
    return out


def _weight_dtype(wanted: DTypeLike | None, stored: str) -> np.dtype:
    """What was asked for, or else what it is stored in."""
    if wanted is None:
        return np.dtype("float32" if stored == "float64" else stored)
    try:
        return np.dtype(wanted)
    except TypeError:
        raise ValueError(f"dtype={wanted!r} must be float32, bfloat16 or float16") from None


def _convert(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """To the wanted dtype, on the host: no compilation, no second copy on the device."""
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(dtype, copy=False)
    # Only float16 is narrower in range than what it may be converted from.
    narrows = dtype == np.float16 and array.dtype != np.float16
    if narrows and np.isinf(converted).any() and not np.isinf(array).any():
        raise CheckpointError(
            f"tensor {name} has values beyond float16's range; load it in bfloat16 or float32"
        )
    return converted


def _check_tied(files: TensorFiles, head: str, embed: str) -> None:
    """A tied model's head, where one is stored too, must be the embedding."""
    if not np.array_equal(files.read(head), files.read(embed)):
        raise CheckpointError(
            f"{files.directory}: config.json says tie_word_embeddings, but {head} differs from "
            f"{embed}; set tie_word_embeddings to false there to use both"
        )
