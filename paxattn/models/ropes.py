"""Rotary embeddings from a Hugging Face ``config.json``, under its older and newer spelling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from paxattn.models.fields import Fields, short
from paxattn.rope import ROPE_KINDS, Rope

Options = dict[str, Any]
"""Keyword arguments of `DecoderConfig`."""

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


def one_rope(
    read: Fields, theta: float = 10_000.0, absent: Mapping[str, Any] | None = None
) -> Options:
    """From ``rope_parameters``, or ``rope_theta`` and ``rope_scaling``."""
    key = "rope_scaling" if read.fields.get("rope_scaling") else "rope_parameters"
    values = read.object(key) or absent or {}
    return dict(rope=_rope(read, values, key, read.number("rope_theta", theta)))


def two_ropes(read: Fields) -> Options:
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
        rope=_rope(read, scaled, name, theta),
        local_rope=_rope(read, both.object(local), key, local_theta),
    )


def _rope(read: Fields, values: Mapping[str, Any], key: str, theta: float) -> Rope:
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
