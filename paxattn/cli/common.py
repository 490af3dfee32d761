"""What the commands share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jax
import platformdirs
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from paxattn.display import Output
from paxattn.models import Checkpoint, bundled, load
from paxattn.quantized import PAGE_DTYPES

DTYPES = ("float32", "bfloat16", "float16")
_KV_DTYPES = ("fp8", *PAGE_DTYPES)


def not_empty(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """An option's callback that refuses the empty string."""
    if value == "":
        raise click.BadParameter("is empty", context, option)
    return value


model_option = click.option(
    "--model",
    "-m",
    callback=not_empty,
    help="Checkpoint directory or hub id.  [default: the small bundled model of Python code]",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of weights and cache.  [default: the checkpoint's; float32 on a CPU]",
)
kv_dtype_option = click.option(
    "--kv-dtype",
    type=click.Choice(_KV_DTYPES),
    help="Of the cache alone; fp8 and int8 pages hold about twice the tokens of bfloat16.  "
    "[default: as --dtype]",
)
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


def fields(values: Mapping[str, Any]) -> str:
    """Names and values on a line."""
    return " ".join(f"{name}={value}" for name, value in values.items())


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless JAX was told where already."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update(
            "jax_compilation_cache_dir", str(Path(platformdirs.user_cache_dir("paxattn")) / "jax")
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def loading(log: Output) -> Iterator[Callable[[int, int], None]]:
    """A bar for `models.load`, to be given as its ``progress``."""
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def load_checkpoint(model: str | None, dtype: str | None, log: Output) -> Checkpoint:
    """A checkpoint with a tokenizer; the bundled one for None. Shows a bar while it is read."""
    use_compilation_cache()
    devices()
    with loading(log) as progress:
        checkpoint = load(model or bundled(), dtype=dtype_here(dtype), progress=progress)
    if checkpoint.tokenizer is None:
        raise click.UsageError(f"{model} has no tokenizer.json, so it cannot read text prompts")
    return checkpoint


def dtype_here(dtype: str | None) -> str | None:
    """What to load weights in where nobody says: None is what the checkpoint says."""
    if dtype is None and jax.default_backend() == "cpu":
        return "float32"  # CPUs emulate 16-bit arithmetic, slowly
    return dtype
