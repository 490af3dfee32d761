"""`paxattn bench`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import jax
from rich.table import Table

import paxattn
from paxattn.attention import explain, measure, tune, tuning
from paxattn.attention.choice import Names, in_order
from paxattn.attention.measure import Workload
from paxattn.cli.common import DTYPES, devices, fields, kv_dtype_option, page_size_option
from paxattn.display import Output
from paxattn.quantized import is_quantized, page_dtype_name
from paxattn.target import target_of

_SHAPES = {
    "cpu": ("8x256", "8x1024", "1x512/512"),
    "other": (
        "8x1024",
        "64x4096",
        "8x32768",
        "1x131072+31x4096",
        "1x512/4096+63x4096",
        "1x8192/8192",
    ),
}


@click.command(
    epilog="""\b
    Examples:
      paxattn bench
      paxattn bench 64x4096 2x512/2048 --heads 32/8 --head-dim 128 --page-size 16
      paxattn bench 8x1024 64x4096 --tune
    """
)
@click.argument("shapes", nargs=-1)
@click.option("--heads", default="32/8", show_default=True, help="Query heads / KV heads.")
@click.option("--head-dim", type=click.IntRange(1), default=128, show_default=True)
@page_size_option
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of queries and pages.  [default: bfloat16; float32 on a CPU]",
)
@kv_dtype_option
@click.option(
    "--implementation",
    help='Such as "reference" or "mosaic_gpu".  [default: what the library chooses; with --tune, '
    "what it could choose]",
)
@click.option(
    "--tune",
    "tuned",
    is_flag=True,
    help="Check all configs against the reference, and write the fastest into the table.",
)
@click.option(
    "--table",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Table of tuned configs to use, and to write with --tune.  [default: yours]",
)
def bench(
    shapes: tuple[str, ...],
    heads: str,
    head_dim: int,
    page_size: int,
    dtype: str | None,
    kv_dtype: str | None,
    implementation: str | None,
    tuned: bool,
    table: Path | None,
) -> None:
    """Time paged attention on this machine, for SHAPES such as 64x4096.

    64x4096 is a decode step of 64 sequences of 4096 tokens; 2x512/2048 runs the last 512 of 2048
    tokens of two sequences; 1x512/4096+63x4096 has rows of both kinds.
    """
    devices()
    on_cpu = jax.default_backend() == "cpu"
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", heads)
    if match is None or int(match[2]) == 0 or int(match[1]) % int(match[2]) or not int(match[1]):
        raise click.UsageError(f"--heads {heads}: write 32/8, the former a multiple of the latter")
    pages = page_dtype_name(kv_dtype)
    if pages is not None and not is_quantized(pages):
        raise click.UsageError(f"--kv-dtype {kv_dtype}: pages of floats have the --dtype")
    names = shapes or _SHAPES["cpu" if on_cpu else "other"]
    works = [
        Workload(
            rows=measure.parse_rows(name),
            num_q_heads=int(match[1]),
            num_kv_heads=int(match[2]),
            head_dim=head_dim,
            page_size=page_size,
            dtype=dtype or ("float32" if on_cpu else "bfloat16"),
            page_dtype=pages,
        )
        for name in names
    ]
    path = table or tuning.user_table()
    known = tuning.read(path) if table else tuning.entries()
    out, log = Output(highlight=False), Output(stderr=True, highlight=False)
    asked: Names = implementation
    with tuning.use(known):
        if tuned:
            asked = in_order(implementation, target_of(None))
            known = _tune(works, asked, path, out, log)
    with tuning.use(known):
        _time(names, works, asked, out, log)


def _tune(
    works: Sequence[Workload], implementation: Sequence[str], path: Path, out: Output, log: Output
) -> tuple[tuning.Entry, ...]:
    """Shows every candidate, writes the table, and returns all entries."""
    known = tuning.entries()
    with log.status("") as status:
        entries, trials = tune.tune(
            works, implementation=implementation, version=paxattn.__version__, report=status.update
        )
    for question, tried in itertools.groupby(trials, key=lambda trial: trial.question):
        out.print(f"{question.kernel}: {fields(question.key)}", markup=False, soft_wrap=True)
        shown = Table("config", "over heuristic", "", box=None, pad_edge=False)
        for trial in tried:
            notes = ["chosen"] if trial.chosen else []
            notes += ["(heuristic)"] if trial.config == question.default else []
            time = "" if trial.over_default is None else f"{trial.over_default:.3f}"
            config = fields(question.entry(trial.config).config)
            shown.add_row(config, time, trial.failure or " ".join(notes))
        out.print(shown)
        out.print()
    if entries:
        tuning.write(path, entries)
        out.print(f"wrote {path}\n", markup=False, soft_wrap=True)
    else:
        out.print("nothing to tune: what serves these batches has one config\n")
    return (*known, *entries)


def _time(
    names: Sequence[str], works: Sequence[Workload], implementation: Names,
    out: Output, log: Output,
) -> None:  # fmt: skip
    shown = Table(box=None, pad_edge=False)
    for column in ("batch", "attention", "config", "us", "GB/s", "GFLOP/s"):
        right = column in ("us", "GB/s", "GFLOP/s")
        shown.add_column(column, justify="right" if right else "left")
    with log.status("") as status:
        for name, work in zip(names, works, strict=True):
            status.update(name)
            seconds = _seconds(work, implementation)
            shown.add_row(
                name,
                _served_by(work, implementation),
                _configs(work, implementation),
                f"{seconds * 1e6:,.1f}",
                f"{work.num_bytes / seconds / 1e9:,.1f}",
                f"{work.num_flops / seconds / 1e9:,.1f}",
            )
    one = works[0]
    out.print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: "
        f"{one.num_q_heads}/{one.num_kv_heads} heads, head_dim {one.head_dim}, "
        f"page_size {one.page_size}, {one.dtype}"
        + (f", pages {one.page_dtype}" if one.page_dtype else ""),
        markup=False,
        soft_wrap=True,
    )
    out.print(shown)


def _seconds(work: Workload, implementation: Names) -> float:
    steps = measure.steps_for(work)
    run = measure.compile_loop(
        measure.op_of(work, implementation), measure.make_inputs(work), steps
    )
    return measure.take_turns({0: run}, steps=steps, repeats=7)[0]


def _served_by(work: Workload, implementation: Names) -> str:
    x: Any = jax.eval_shape(lambda: measure.make_inputs(work, turns=1))
    tables = jax.ShapeDtypeStruct(x.tables.shape[1:], x.tables.dtype)
    made = explain(
        x.q, x.k_pages, x.v_pages, implementation=implementation, block_tables=tables,
        kv_lens=x.kv_lens, cu_q_lens=x.cu_q_lens, max_q_len=work.max_q_len,
        k_scales=x.k_scales, v_scales=x.v_scales, num_kv_heads=work.num_kv_heads,
    )  # fmt: skip
    return made.implementation or "nothing"


def _configs(work: Workload, implementation: Names) -> str:
    """Which configs serve, and whence they come."""
    found = []
    for question in tune.questions_of(work, implementation):
        entry = tuning.find(question)
        tuned = entry is not None and tuning.fitting(entry, question) is not None
        found.append(f"tuned: {fields(entry.config)}" if entry and tuned else "heuristic")
    return ", ".join(dict.fromkeys(found))
