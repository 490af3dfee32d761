"""What each Hugging Face ``model_type`` means: defaults, options, windows and rotation.

A `Family` says what a config.json of its kind leaves out, and which of its fields mean what to a
`DecoderConfig`; the fields that all families share are read in `config`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from paxattn.models.decoder_config import Experts
from paxattn.models.fields import Fields, short
from paxattn.rope import ROPE_KINDS, Rope

Options = dict[str, Any]
"""Keyword arguments of `DecoderConfig`."""
Sliding = tuple[int | None, list[bool]]
"""A window in tokens, if there is one, and which layers have it."""

_ROPE_KEYS = {
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


# Options


def _activation(read: Fields, key: str = "hidden_act", default: str = "silu") -> Options:
    value = read.fields.get(key, default)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise read.fail(f"{key}={short(value)} is not supported; supported: {known}")
    return dict(activation=_ACTIVATIONS[value])


def _biases(read: Fields) -> Options:
    biased = read.flag("attention_bias")
    return dict(qkv_bias=biased, o_bias=biased)


def _llama(read: Fields) -> Options:
    return _activation(read) | _biases(read)


def _qwen2(read: Fields) -> Options:
    return _activation(read) | dict(qkv_bias=True)  # transformers ignores attention_bias


def _qwen3(read: Fields) -> Options:
    return _llama(read) | dict(qk_norm=True)


def _gemma(read: Fields) -> Options:
    options = dict(
        scale_embeddings=True,
        out_norms=True,
        sm_scale=read.number("query_pre_attn_scalar") ** -0.5,
        final_soft_cap=read.number_or_none("final_logit_softcapping"),
    )
    activation = _activation(read, "hidden_activation", "gelu_pytorch_tanh")
    return options | activation | _biases(read)


def _gemma2(read: Fields) -> Options:
    return _gemma(read) | dict(soft_cap=read.number_or_none("attn_logit_softcapping"))


def _gemma3(read: Fields) -> Options:
    return _gemma(read) | dict(qk_norm=True)  # transformers ignores attn_logit_softcapping


def _gpt_oss(read: Fields) -> Options:
    experts = Experts(
        num_experts=read.size("num_local_experts"),
        per_token=read.size("num_experts_per_tok"),
        alpha=read.number("swiglu_alpha"),
        limit=read.number("swiglu_limit"),
    )
    return _biases(read) | dict(sinks=True, experts=experts)


# Windows: their length in tokens, if any, and the layers that have one if layer_types is absent


def _none_slides(read: Fields, num_layers: int) -> Sliding:
    return None, [False] * num_layers


def _all_slide(read: Fields, num_layers: int) -> Sliding:
    window = _window(read)
    return window, [window is not None] * num_layers


def _upper_slide(read: Fields, num_layers: int) -> Sliding:
    window = _window(read) if read.flag("use_sliding_window") else None
    first = read.size("max_window_layers", 28) if read.fields.get("max_window_layers") != 0 else 0
    return window, [window is not None and layer >= first for layer in range(num_layers)]


def _every_other_slides(read: Fields, num_layers: int) -> Sliding:
    return _window(read), [layer % 2 == 0 for layer in range(num_layers)]


def _all_but_every_nth_slide(read: Fields, num_layers: int) -> Sliding:
    count = read.size("sliding_window_pattern", 6)
    return _window(read), [(layer + 1) % count != 0 for layer in range(num_layers)]


def _window(read: Fields) -> int | None:
    return None if read.fields.get("sliding_window") is None else read.size("sliding_window")


# Rotation


def rope_from(read: Fields, values: Mapping[str, Any], key: str, theta: float) -> Rope:
    """A rotary embedding.

    Args:
        read: config.json.
        values: its ``rope_parameters`` or ``rope_scaling``, or a part of them.
        key: what to call these in errors.
        theta: the base where they do not say.

    Raises:
        CheckpointError: something in it is not known, or senseless.
    """
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise read.fail(
            f"{key} has rope_type={short(kind)}, which is not supported; supported: "
            f"{', '.join(ROPE_KINDS)}"
        )
    unknown = sorted(set(values) - _ROPE_KEYS)
    if unknown:
        raise read.fail(f"{key} has {unknown[0]!r}, which is not supported")
    if values.get("partial_rotary_factor") not in (None, 1):
        factor = values["partial_rotary_factor"]
        raise read.fail(f"{key} has partial_rotary_factor={factor!r}, which is not supported")
    nested = Fields(values, f"{read.where}: {key}")
    options: dict[str, Any] = {}
    if kind != "default":
        options["factor"] = nested.number("factor")
    if kind in ("llama3", "yarn"):
        # As in transformers: the model's own field comes before the nested one.
        old_length = "original_max_position_embeddings"
        where = read if read.fields.get(old_length) else nested
        options["original_max_positions"] = where.size(
            old_length, read.size("max_position_embeddings")
        )
    if kind == "llama3":
        options["low_freq_factor"] = nested.number("low_freq_factor")
        options["high_freq_factor"] = nested.number("high_freq_factor")
    if kind == "yarn":
        options["low_freq_factor"] = nested.number("beta_slow", 1.0)
        options["high_freq_factor"] = nested.number("beta_fast", 32.0)
        options["truncate"] = nested.flag("truncate", True)
        options["attention_factor"] = _attention_factor(nested, options["factor"])
    return Rope(theta=nested.number("rope_theta", theta), kind=kind, **options)


def _attention_factor(values: Fields, factor: float) -> float | None:
    """YaRN's factor on cosines and sines; None: the paper's."""
    scales = [values.number_or_none(key) for key in ("mscale", "mscale_all_dim")]
    if values.fields.get("attention_factor") is not None or None in scales:
        return values.number_or_none("attention_factor")
    above, below = (0.1 * (scale or 0) * math.log(max(factor, 1.0)) + 1.0 for scale in scales)
    return above / below


def _one_rope(
    read: Fields, theta: float = 10_000.0, absent: Mapping[str, Any] | None = None
) -> Options:
    """From ``rope_parameters``, or ``rope_theta`` and ``rope_scaling``."""
    key = "rope_scaling" if read.fields.get("rope_scaling") else "rope_parameters"
    values = read.object(key) or absent or {}
    return dict(rope=rope_from(read, values, key, read.number("rope_theta", theta)))


def _two_ropes(read: Fields) -> Options:
    """One for layers with a window, one for those without, under either spelling."""
    key, full, local = "rope_parameters", "full_attention", "sliding_attention"
    both = Fields(read.object(key), f"{read.where}: {key}")
    unknown = sorted(set(both.fields) - {full, local})
    if unknown:
        raise read.fail(f"{key} has {unknown[0]!r}, which is not supported; it has {full}, {local}")
    scaled = {**both.object(full), **read.object("rope_scaling")}
    theta, local_theta = read.number("rope_theta", 1e6), read.number("rope_local_base_freq", 1e4)
    name = key if both.fields else "rope_scaling"
    return dict(
        rope=rope_from(read, scaled, name, theta),
        local_rope=rope_from(read, both.object(local), key, local_theta),
    )


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to read the config.json of one ``model_type``.

    Attributes:
        architecture: the class in transformers, as the file names it.
        options: what its fields say beyond what all families have.
        sliding: the window, and which layers have it where ``layer_types`` is absent.
        may_choose: ``layer_types`` may say otherwise.
        ropes: how positions turn into angles.
        defaults: fields that the file may leave out. (Null is not the same as absent.)
        quantized: the ``quant_method`` that its checkpoints may have.
        norm_offset: added to the norms' weights on loading.
        part: name of the object inside config.json that describes the decoder.
    """

    architecture: str
    options: Callable[[Fields], Options] = _llama
    sliding: Callable[[Fields, int], Sliding] = _none_slides
    may_choose: bool = True
    ropes: Callable[[Fields], Options] = _one_rope
    defaults: Mapping[str, Any] = field(default_factory=dict)
    quantized: str | None = None
    norm_offset: float = 0.0
    part: str | None = None


_GEMMA = dict(
    vocab_size=256_000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=8192,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    query_pre_attn_scalar=256,
    sliding_window=4096,
)
_GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    options=_gemma3,
    sliding=_all_but_every_nth_slide,
    ropes=_two_ropes,
    defaults=_GEMMA | dict(vocab_size=262_208, max_position_embeddings=131_072),
    norm_offset=1.0,
)
_GPT_OSS = dict(
    head_dim=64,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    attention_bias=True,
    sliding_window=128,
    num_local_experts=128,
    num_experts_per_tok=4,
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
)
_GPT_OSS_ROPE = dict(
    rope_type="yarn",
    factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=4096,
)

FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", may_choose=False),
    "mistral": Family(
        architecture="MistralForCausalLM",
        options=_activation,  # transformers ignores attention_bias
        sliding=_all_slide,
        may_choose=False,
        defaults=dict(sliding_window=4096, num_key_value_heads=8),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        options=_qwen2,
        sliding=_upper_slide,
        defaults=dict(num_key_value_heads=32),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        options=_qwen3,
        sliding=_upper_slide,
        defaults=dict(head_dim=128, num_key_value_heads=32),
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        options=_gemma2,
        sliding=_every_other_slides,
        defaults=_GEMMA | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        norm_offset=1.0,
    ),
    "gemma3_text": _GEMMA3,
    "gemma3": replace(_GEMMA3, architecture="Gemma3ForConditionalGeneration", part="text_config"),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        options=_gpt_oss,
        sliding=_every_other_slides,
        ropes=partial(_one_rope, theta=150_000.0, absent=_GPT_OSS_ROPE),
        defaults=_GPT_OSS,
        quantized="mxfp4",
    ),
}
