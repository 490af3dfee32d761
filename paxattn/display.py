"""What `paxattn generate` shows: growing completions, and a summary of the run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from paxattn.generate import PoolStats, Stream

_REFRESH_PER_SECOND = 12


class Report:
    """What the summary needs to know of a run."""

    def __init__(self, num_prompts: int) -> None:
        self.started = time.perf_counter()
        self.first: float | None = None  # the prompts have run
        self.steady: tuple[float, int] | None = None  # the decode loop is compiled
        self.last = self.started
        self.tokens = 0
        self.reasons = [""] * num_prompts

    def add(self, index: int, tokens: int, reason: str | None) -> None:
        """Count a delta."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += tokens
        if self.steady is None and self.tokens > len(self.reasons):
            self.steady = (self.last, self.tokens)
        if reason:
            self.reasons[index] = reason

    @property
    def rate(self) -> float | None:
        """Tokens per second once everything is compiled; None if the run was too short."""
        if self.steady is None or self.tokens == self.steady[1]:
            return None
        return (self.tokens - self.steady[1]) / (self.last - self.steady[0])


def show_plain(running: Stream, texts: list[str], report: Report, log: Console) -> None:
    """Completions in order of the prompts, each streamed as soon as those before it are done."""
    waiting: list[list[str]] = [[] for _ in texts]
    current = 0
    several = len(texts) > 1

    def begin(i: int) -> None:
        click.echo(f"=== {i + 1}: {texts[i]}" if several else texts[i], nl=several)

    with log.status("compiling and reading the prompts"):
        first = next(running)
    begin(0)
    for delta in _chain(first, running):
        report.add(delta.index, len(delta.tokens), delta.finish_reason)
        waiting[delta.index].append(delta.text)
        while current < len(texts):
            click.echo("".join(waiting[current]), nl=False)
            waiting[current].clear()
            if not report.reasons[current]:
                break
            click.echo()
            current += 1
            if current < len(texts):
                begin(current)
        sys.stdout.flush()


def _chain(first: Any, rest: Stream) -> Iterator[Any]:
    yield first
    yield from rest


def show_live(running: Stream, texts: list[str], report: Report, log: Console) -> None:
    """All completions side by side while they grow; in full at the end."""
    written = [""] * len(texts)
    console = Console()

    def panels(tail: int | None) -> Group:
        return Group(
            *(
                Panel(
                    Text.assemble((text, "bold"), _tail(new, tail)),
                    title=f"{i + 1}",
                    subtitle=report.reasons[i] or "...",
                    title_align="left",
                    subtitle_align="right",
                )
                for i, (text, new) in enumerate(zip(texts, written, strict=True))
            )
        )

    with log.status("compiling and reading the prompts"):
        first = next(running)
    room = max(3, (console.height - 2) // len(texts) - 3)
    with Live(console=console, transient=True, auto_refresh=False) as live:
        shown = 0.0
        for delta in _chain(first, running):
            report.add(delta.index, len(delta.tokens), delta.finish_reason)
            written[delta.index] += delta.text
            if report.last - shown > 1 / _REFRESH_PER_SECOND:
                live.update(panels(room), refresh=True)
                shown = report.last
    console.print(panels(None))


def _tail(text: str, lines: int | None) -> str:
    """The last lines of a text that has no room for all of them."""
    parts = text.split("\n")
    return text if lines is None or len(parts) <= lines else "\n...\n" + "\n".join(parts[-lines:])


def summary(log: Console, report: Report, stats: PoolStats, max_positions: int) -> None:
    """Print tokens, speed, pages and utilization."""
    table = Table(show_header=False, box=None, pad_edge=False)
    speed = "" if report.rate is None else f", {report.rate:,.0f} tokens/s once compiled"
    table.add_row("tokens", f"{report.tokens} in {report.last - report.started:.1f} s{speed}")
    table.add_row("first", f"after {(report.first or report.last) - report.started:.1f} s")
    reasons = sorted(set(report.reasons))
    table.add_row("ended by", ", ".join(f"{r} {report.reasons.count(r)}" for r in reasons))
    size = decimal(stats.peak_pages * stats.bytes_per_page)
    table.add_row(
        "pages",
        f"{stats.peak_pages} of {stats.num_pages} at most, {stats.page_size} tokens each ({size})",
    )
    table.add_row(
        "utilization",
        f"{stats.utilization:.1%} of the held slots; reserving {max_positions:,} tokens for each "
        f"prompt would use {stats.naive_utilization:.1%}",
    )
    log.print(table, highlight=False)
