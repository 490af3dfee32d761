"""What each Hugging Face ``model_type`` means: defaults, options and windows.

A `Family` says what a config.json of its kind leaves out, and which of its fields mean what to a
`DecoderConfig`; the fields that all families share are read in `config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from paxattn.models.decoder_config import Experts
from paxattn.models.fields import Fields, short
from paxattn.models.ropes import Options, one_rope, two_ropes

Sliding = tuple[int | None, list[bool]]
"""A window in tokens, if there is one, and which layers have it."""

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
    if not read.flag("use_sliding_window"):
        return _none_slides(read, num_layers)
    window = _window(read)
    first = read.size("max_window_layers", 28) if read.fields.get("max_window_layers") != 0 else 0
    return window, [window is not None and layer >= first for layer in range(num_layers)]


def _every_other_slides(read: Fields, num_layers: int) -> Sliding:
    return _window(read), [layer % 2 == 0 for layer in range(num_layers)]


def _all_but_every_nth_slide(read: Fields, num_layers: int) -> Sliding:
    count = read.size("sliding_window_pattern", 6)
    return _window(read), [(layer + 1) % count != 0 for layer in range(num_layers)]


def _window(read: Fields) -> int | None:
    return None if read.fields.get("sliding_window") is None else read.size("sliding_window")


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
    ropes: Callable[[Fields], Options] = one_rope
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
    ropes=two_ropes,
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
        defaults=dict(num_key_value_heads=32, sliding_window=4096),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        options=_qwen3,
        sliding=_upper_slide,
        defaults=dict(head_dim=128, num_key_value_heads=32, sliding_window=4096),
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
        ropes=partial(one_rope, theta=150_000.0, absent=_GPT_OSS_ROPE),
        defaults=_GPT_OSS,
        quantized="mxfp4",
    ),
}
