"""`paxattn doctor`."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import click
import jax
from rich.filesize import decimal
from rich.table import Table

import paxattn
from paxattn.attention import implementations, tuning
from paxattn.cli.common import devices, fields
from paxattn.display import Output


@click.command()
def doctor() -> None:
    """Show versions, devices, and which attention implementations this machine can use."""
    console = Output(highlight=False)
    versions = Table(show_header=False, box=None, pad_edge=False)
    versions.add_row("paxattn", paxattn.__version__)
    versions.add_row("python", sys.version.split()[0])
    for name in ("jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers"):
        versions.add_row(name, metadata.version(name))
    console.print(versions)
    console.print()

    table = Table("device", "platform", "kind", "memory", box=None, pad_edge=False)
    for device in devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        size = decimal(limit) if limit else "not reported"
        table.add_row(str(device), device.platform, device.device_kind, size)
    console.print(table)
    console.print()

    choices = Table("attention", "serves", "why", box=None, pad_edge=False)
    for row in implementations():
        choices.add_row(*row)
    console.print(choices)
    _show_tuned(console)
    if jax.default_backend() == "cpu":
        console.print()
        console.print(
            'No accelerator is in use. With an NVIDIA GPU install "paxattn[cuda]", on a TPU host '
            '"paxattn[tpu]".',
            markup=False,
        )


def _show_tuned(console: Output) -> None:
    """The tuned configs that kernels on these devices will find."""
    here = {device.device_kind for device in devices()}
    shown = Table("tuned kernel", "device", "for", "config", box=None, pad_edge=False)
    for entry in {entry.place: entry for entry in tuning.entries()}.values():
        if entry.device in here:
            shown.add_row(entry.kernel, entry.device, fields(entry.key), fields(entry.config))
    console.print()
    if shown.row_count:
        console.print(shown)
    else:
        console.print(
            "No tuned configs for these devices: heuristics choose (paxattn bench --tune)."
        )
    path = tuning.user_table()
    if path.is_relative_to(Path.home()):
        path = "~" / path.relative_to(Path.home())
    console.print(f"Your table: {path}", markup=False, soft_wrap=True)
