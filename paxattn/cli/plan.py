"""`paxattn plan`."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import click
import jax.numpy as jnp

from paxattn.cli.common import DTYPES, devices, kv_dtype_option, not_empty, page_size_option
from paxattn.display import show_plan
from paxattn.memory import plan as memory_plan
from paxattn.models import DecoderConfig
from paxattn.models.config import read_config
from paxattn.models.weights import expert_shapes, kernel_shapes, model_shapes, vector_shapes
from paxattn.quantized import page_dtype_name


class Bytes(click.ParamType):
    """A number of bytes: 24GiB, 80GB, 512MiB or a plain integer."""

    name = "bytes"
    _UNITS: ClassVar = {f"{p}{u}": base ** (i + 1) for u, base in (("B", 1000), ("iB", 1024))
                        for i, p in enumerate("KMGT")}  # fmt: skip

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Bytes, or click's error."""
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B|B?)", str(value).strip())
        if match is None or len(match[1]) > 30:
            self.fail(
                f"{str(value)[:40]!r} is not a size such as 24GiB, 80GB or 512MiB", param, ctx
            )
        size = int(Fraction(match[1]) * self._UNITS.get(match[2], 1))
        if size >= 2**63:
            self.fail(f"{value} is more than any device has", param, ctx)
        return size


@click.command(
    epilog="""\b
    Examples:
      paxattn plan --model DIR --memory 24GiB --mean-len 500
      paxattn plan --layers 32 --kv-heads 8 --head-dim 128 --weights 16GB --memory 80GB
    """
)
@click.option(
    "--model", "-m", callback=not_empty, help="Checkpoint directory: gives shapes and weights."
)
@click.option("--layers", type=click.IntRange(1), help="Without --model: layers.")
@click.option("--kv-heads", type=click.IntRange(1), help="Without --model: KV heads per layer.")
@click.option("--head-dim", type=click.IntRange(1), help="Without --model: elements per head.")
@click.option("--weights", type=Bytes(), help="Bytes of the weights.  [default: the model's, or 0]")
@click.option(
    "--memory", type=Bytes(), help="Budget, such as 24GiB.  [default: the first device's memory]"
)
@click.option(
    "--max-len",
    type=click.IntRange(1),
    help="Tokens a sequence may grow to.  [default: the model's positions, or 2048]",
)
@click.option(
    "--mean-len",
    type=click.IntRange(1),
    help="Tokens of a typical sequence.  [default: a quarter of --max-len]",
)
@click.option(
    "--shared-prefix", type=click.IntRange(0), default=0, help="Tokens all share.  [default: 0]"
)
@page_size_option
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="bfloat16",
    show_default=True,
    help="Of the cache and, with --model, its weights.",
)
@kv_dtype_option
def plan(
    model: str | None,
    layers: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    weights: int | None,
    memory: int | None,
    max_len: int | None,
    mean_len: int | None,
    shared_prefix: int,
    page_size: int,
    dtype: str,
    kv_dtype: str | None,
) -> None:
    """Tell how many sequences fit a device or a byte budget, paged and reserved naively."""
    given = {"--layers": layers, "--kv-heads": kv_heads, "--head-dim": head_dim}
    both = [name for name, value in given.items() if value is not None]
    if model is not None and both:
        raise click.UsageError(f"--model and {both[0]} both tell the shapes: pass one of them")
    if model is not None:
        config = read_config(Path(model))
        shapes = (config.num_layers, config.num_kv_heads, config.head_dim)
        max_len = max_len or config.max_positions
        weights = _weight_bytes(config, dtype) if weights is None else weights
    elif layers and kv_heads and head_dim:
        shapes = (layers, kv_heads, head_dim)
        max_len = max_len or 2048
    else:
        raise click.UsageError("pass --model, or all of --layers, --kv-heads and --head-dim")
    if memory is None:
        memory = (devices()[0].memory_stats() or {}).get("bytes_limit")
        if memory is None:
            raise click.UsageError("this device does not report its memory: pass --memory")
    sizes = memory_plan(
        memory_bytes=memory,
        weight_bytes=weights or 0,
        num_layers=shapes[0],
        num_kv_heads=shapes[1],
        head_dim=shapes[2],
        max_len=max_len,
        mean_len=mean_len or max(1, max_len // 4),
        dtype=kv_dtype or dtype,
        page_size=page_size,
        shared_prefix=shared_prefix,
    )
    show_plan(sizes, page_dtype_name(kv_dtype) or dtype)


def _weight_bytes(config: DecoderConfig, dtype: str) -> int:
    """Bytes of a model's weights, from its shapes alone."""
    in_layer = kernel_shapes(config) | expert_shapes(config) | vector_shapes(config)
    elements = config.num_layers * sum(map(math.prod, in_layer.values()))
    elements += sum(map(math.prod, model_shapes(config).values()))
    return elements * jnp.dtype(dtype).itemsize
