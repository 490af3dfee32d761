"""How to read what a decoder looks like from a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paxattn.models.decoder_config import DecoderConfig
from paxattn.models.families import FAMILIES, Family
from paxattn.models.fields import CheckpointError, Fields, read_json, short

# Fields that change the mathematics, with the only values that the decoder computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "use_mrope": (False, None),
    "add_cross_attention": (False, None),
    "use_bidirectional_attention": (False, None),
}
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_MOST_LAYERS = 2**20  # far beyond any model; so many can still be listed one by one
# What a model of several parts says of all of them.
_OF_ALL_PARTS = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")


def config_from_dict(fields: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Translate the fields of a Hugging Face ``config.json``.

    Understands both the older spelling (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and the
    newer (``rope_parameters``, ``dtype``).

    Args:
        fields: the JSON object.
        where: what to call it in errors.

    Raises:
        CheckpointError: an unknown model type, a missing or senseless field, or a field whose value
            asks for something that the decoder does not compute.
    """
    name, family = _family(Fields(fields, where))
    read = _decoder_fields(Fields(fields, where), family)
    for key, allowed in _ONLY.items():
        if key in read.fields and read.fields[key] not in allowed:
            value = short(read.fields[key])
            raise read.fail(f"{key}={value} is not supported, only {allowed[0]!r}")
    num_layers, num_heads = read.size("num_hidden_layers"), read.size("num_attention_heads")
    if num_layers > _MOST_LAYERS:
        raise read.fail(f"num_hidden_layers={num_layers} must be at most {_MOST_LAYERS}")
    hidden_size = read.size("hidden_size")
    head_dim = read.fields.get("head_dim")
    if head_dim is None and hidden_size % num_heads:
        raise read.fail(f"{hidden_size=} is no multiple of num_attention_heads={num_heads}")
    dtype = read.fields.get("dtype") or read.fields.get("torch_dtype")
    if isinstance(dtype, str):
        dtype = dtype.removeprefix("torch.")
    if dtype is not None and dtype not in _DTYPES:
        raise read.fail(f"{dtype=} is not supported; supported: {', '.join(_DTYPES)}")
    try:
        return DecoderConfig(
            vocab_size=read.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=read.size("num_key_value_heads", num_heads),
            head_dim=read.size("head_dim", hidden_size // num_heads),
            max_positions=read.size("max_position_embeddings"),
            norm_eps=read.number("rms_norm_eps"),
            tie_embeddings=read.flag("tie_word_embeddings"),
            windows=_windows(read, name, family, num_layers),
            dtype=dtype,
            family=name,
            **family.ropes(read),
            **family.options(read),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise read.fail(str(error)) from None


def _family(read: Fields) -> tuple[str, Family]:
    """What kind of model it is."""
    name = read.fields.get("model_type")
    known = ", ".join(f"{key} ({family.architecture})" for key, family in FAMILIES.items())
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or not isinstance(name, str):
        raise read.fail(f"model_type={name!r} is not supported; supported: {known}")
    architectures = read.fields.get("architectures") or [family.architecture]
    if not isinstance(architectures, list) or family.architecture not in architectures:
        raise read.fail(f"architectures={architectures!r} is not supported; supported: {known}")
    return name, family


def _decoder_fields(read: Fields, family: Family) -> Fields:
    """The fields that describe the decoder, with the family's defaults for those left out."""
    fields, where = read.fields, read.where
    if family.part is not None:
        shared = {key: fields[key] for key in _OF_ALL_PARTS if key in fields}
        fields = {**read.object(family.part), **shared}
        where = f"{where}: {family.part}"
    fields = {**family.defaults, **fields}
    quantized = fields.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
    if method is not None and method == family.quantized:
        fields.pop("quantization_config")
    return Fields(fields, where)


def _windows(read: Fields, name: str, family: Family, num_layers: int) -> tuple[int, ...]:
    """Sliding window per layer; empty when no layer has one."""
    layer_types = read.fields.get("layer_types")
    window, sliding = family.sliding(read, num_layers)
    if layer_types is not None:
        kinds = {"full_attention": False, "sliding_attention": True}
        if not isinstance(layer_types, list) or not all(
            isinstance(kind, str) and kind in kinds for kind in layer_types
        ):
            raise read.fail(f"layer_types={short(layer_types)}: supported are {', '.join(kinds)}")
        if len(layer_types) != num_layers:
            raise read.fail(f"{len(layer_types)=} must be num_hidden_layers={num_layers}")
        named = [kinds[kind] for kind in layer_types]
        if named != sliding and not family.may_choose:
            raise read.fail(f"layer_types={short(layer_types)} is not supported for {name}")
        sliding = named
    if not any(sliding):
        return ()
    if window is None:
        raise read.fail("layer_types has sliding_attention, but there is no sliding_window in use")
    return tuple(window if slides else 0 for slides in sliding)


def read_config(directory: Path) -> DecoderConfig:
    """Read ``config.json`` of a checkpoint directory.

    Raises:
        CheckpointError: it is missing, damaged, or describes a model that is not supported.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; a Hugging Face checkpoint directory has a config.json"
        )
    return config_from_dict(read_json(path), str(path))
