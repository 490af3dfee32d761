"""What the commands share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click
import jax

DTYPES = ("float32", "bfloat16", "float16")
page_size_option = click.option(
    "--page-size",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    help="Tokens per page.",
)


def devices() -> list[jax.Device]:
    """The devices, or one clear line why there are none."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where a platform has no device
        asked = os.environ.get("JAX_PLATFORMS")
        why = str(error) or f"none of JAX_PLATFORMS={asked}; unset it to use what is there"
        raise click.ClickException(f"JAX found no device: {why}") from None


def not_empty(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """An option's callback that refuses the empty string."""
    if value == "":
        raise click.BadParameter("is empty", context, option)
    return value


def fields(values: Mapping[str, Any]) -> str:
    """Names and values on a line."""
    return " ".join(f"{name}={value}" for name, value in values.items())
