"""What a decoder looks like, and how to read that from a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paxattn.rope import ROPE_KINDS, Rope


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: says which file, field or tensor, and what to do."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and options of a `Decoder`. Static: plain hashable data, safe as a jit constant.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides ``num_heads``.
        head_dim: elements per head (not always ``hidden_size / num_heads``).
        max_positions: tokens per sequence that the model was made for.
        norm_eps: added to the mean square in RMSNorm.
        rope: rotary embedding.
        tie_embeddings: the output head is the embedding.
        qkv_bias: query, key and value projections have a bias.
        qk_norm: queries and keys are RMS-normalised per head before the rotation.
        windows: sliding window per layer in tokens, 0 for full attention; empty for none at all.
        dtype: dtype the weights are meant to have, as ``config.json`` says; None if it does not.
        family: the ``model_type`` it came from, for messages.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    norm_eps: float = 1e-6
    rope: Rope = Rope()  # noqa: RUF009 (frozen)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    dtype: str | None = None
    family: str = "llama"

    def __post_init__(self) -> None:
        sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads"
        for name in f"{sizes} head_dim max_positions".split():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                raise ValueError(f"{name}={value!r} must be a positive integer below 2**31")
        num_heads, num_kv_heads, head_dim = self.num_heads, self.num_kv_heads, self.head_dim
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
        if head_dim % 2:
            raise ValueError(f"{head_dim=} must be even: rotary embedding rotates pairs")
        windows, num_layers = self.windows, self.num_layers
        if windows and len(windows) != num_layers:
            raise ValueError(f"{len(windows)=} must be 0 or {num_layers=}")
        if not all(0 <= window < 2**31 for window in windows):
            raise ValueError(f"{windows=} must be below 2**31 and not negative; 0: full attention")


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What a ``model_type`` implies beyond what its config.json says."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    default_window: int | None = None
    default_head_dim: int | None = None  # else hidden_size / num_heads
    default_kv_heads: int | None = None  # where the field is absent; else num_heads
    reads_attention_bias: bool = True  # False: transformers ignores the field


FAMILIES = {
    "llama": _Family(architecture="LlamaForCausalLM"),
    "mistral": _Family(
        architecture="MistralForCausalLM",
        default_window=4096,
        default_kv_heads=8,
        reads_attention_bias=False,
    ),
    "qwen2": _Family(
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        default_kv_heads=32,
        reads_attention_bias=False,
    ),
    "qwen3": _Family(
        architecture="Qwen3ForCausalLM", qk_norm=True, default_head_dim=128, default_kv_heads=32
    ),
}

# Fields that change the mathematics, with the only values that the decoder computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "use_mrope": (False, None),
    "add_cross_attention": (False, None),
}
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_ROPE_KEYS = {
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


class _Fields:
    """Typed reading of config.json's fields, with errors that name file and field."""

    def __init__(self, fields: Mapping[str, Any], where: str):
        self.fields, self.where = fields, where

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")

    def size(self, key: str, default: int | None = None) -> int:
        value = self.fields.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(f"{key!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self.fail(f"{key}={_short(value)} must be a positive integer below 2**31")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.fields.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(f"{key!r} is missing")
        # Python's JSON reads NaN and Infinity; neither is below the bound.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.fail(f"{key}={value!r} must be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.fields.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(f"{key}={value!r} must be true or false")
        return bool(value)


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
    read = _Fields(fields, where)
    name = fields.get("model_type")
    known = ", ".join(f"{key} ({family.architecture})" for key, family in FAMILIES.items())
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or not isinstance(name, str):
        raise read.fail(f"model_type={name!r} is not supported; supported: {known}")
    architectures = fields.get("architectures") or [family.architecture]
    if not isinstance(architectures, list) or family.architecture not in architectures:
        raise read.fail(f"architectures={architectures!r} is not supported; supported: {known}")
    for key, allowed in _ONLY.items():
        if key == "attention_bias" and not family.reads_attention_bias:
            continue
        if key in fields and fields[key] not in allowed:
            raise read.fail(f"{key}={_short(fields[key])} is not supported, only {allowed[0]!r}")
    num_layers, num_heads = read.size("num_hidden_layers"), read.size("num_attention_heads")
    hidden_size, max_positions = read.size("hidden_size"), read.size("max_position_embeddings")
    absent = "num_key_value_heads" not in fields  # null means something else
    num_kv_heads = family.default_kv_heads if absent and family.default_kv_heads else num_heads
    head_dim = fields.get("head_dim") or family.default_head_dim
    if head_dim is None and hidden_size % num_heads:
        raise read.fail(f"{hidden_size=} is no multiple of num_attention_heads={num_heads}")
    dtype = fields.get("dtype") or fields.get("torch_dtype")
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
            num_kv_heads=read.size("num_key_value_heads", num_kv_heads),
            head_dim=read.size("head_dim", head_dim or hidden_size // num_heads),
            max_positions=max_positions,
            norm_eps=read.number("rms_norm_eps"),
            rope=_rope(read, max_positions),
            tie_embeddings=read.flag("tie_word_embeddings"),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            windows=_windows(read, name, family, num_layers),
            dtype=dtype,
            family=name,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise read.fail(str(error)) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]}..."


def _rope(read: _Fields, max_positions: int) -> Rope:
    """Rotary embedding from ``rope_parameters``, or ``rope_theta`` and ``rope_scaling``."""
    key = "rope_scaling" if read.fields.get("rope_scaling") else "rope_parameters"
    values = read.fields.get(key) or {}
    if not isinstance(values, Mapping):
        raise read.fail(f"{key}={_short(values)} must be an object")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise read.fail(
            f"{key} has rope_type={_short(kind)}, which is not supported; supported: "
            f"{', '.join(ROPE_KINDS)}"
        )
    unknown = sorted(set(values) - _ROPE_KEYS)
    if unknown:
        raise read.fail(f"{key} has {unknown[0]!r}, which is not supported")
    if values.get("partial_rotary_factor") not in (None, 1):
        factor = values["partial_rotary_factor"]
        raise read.fail(f"{key} has partial_rotary_factor={factor!r}, which is not supported")
    nested = _Fields(values, f"{read.where}: {key}")
    options: dict[str, Any] = {}
    if kind != "default":
        options["factor"] = nested.number("factor")
    if kind == "llama3":
        options["low_freq_factor"] = nested.number("low_freq_factor")
        options["high_freq_factor"] = nested.number("high_freq_factor")
        # As in transformers: the model's own field comes before the nested one.
        old_length = "original_max_position_embeddings"
        where = read if read.fields.get(old_length) else nested
        options["original_max_positions"] = where.size(old_length, max_positions)
    theta = nested.number("rope_theta", read.number("rope_theta", 10_000.0))
    return Rope(theta=theta, kind=kind, **options)


def _windows(read: _Fields, name: str, family: _Family, num_layers: int) -> tuple[int, ...]:
    """Sliding window per layer; empty when no layer has one."""
    fields = read.fields
    layer_types = fields.get("layer_types")
    window = fields.get("sliding_window", family.default_window)
    if name.startswith("qwen"):
        window = window if read.flag("use_sliding_window") else None
        first = read.size("max_window_layers", 28) if fields.get("max_window_layers") != 0 else 0
        sliding = [window is not None and layer >= first for layer in range(num_layers)]
    else:
        # Llama ignores the field, as transformers does; Mistral has it in every layer.
        window = window if name == "mistral" else None
        sliding = [window is not None] * num_layers
    if layer_types is not None:
        kinds = {"full_attention": False, "sliding_attention": True}
        if not isinstance(layer_types, list) or not all(
            isinstance(kind, str) and kind in kinds for kind in layer_types
        ):
            raise read.fail(f"layer_types={_short(layer_types)}: supported are {', '.join(kinds)}")
        if len(layer_types) != num_layers:
            raise read.fail(f"{len(layer_types)=} must be num_hidden_layers={num_layers}")
        named = [kinds[kind] for kind in layer_types]
        if named != sliding and not name.startswith("qwen"):
            raise read.fail(f"layer_types={_short(layer_types)} is not supported for {name}")
        sliding = named
    if not any(sliding):
        return ()
    if window is None:
        raise read.fail("layer_types has sliding_attention, but there is no sliding_window in use")
    size = read.size("sliding_window", family.default_window)
    return tuple(size if slides else 0 for slides in sliding)


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
