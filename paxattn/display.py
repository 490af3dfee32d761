"""What the command line shows: growing completions, a summary of the run, a plan."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from paxattn.generate import Stream
from paxattn.memory import MemoryPlan
from paxattn.results import Delta, Generation, PoolStats

_REFRESH_PER_SECOND = 12


class Output(Console):
    """A console that leaves a closed pipe to `cli.main`; rich would exit with code 1."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Off a terminal, without the spaces that fill up a table's last column."""
        if self.is_terminal:
            super().print(*objects, **options)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        self.file.write("\n".join(line.rstrip(" ") for line in captured.get().split("\n")))
        self.file.flush()

    def on_broken_pipe(self) -> None:
        """Called while the error is handled: let it go on."""
        raise


class Search:
    """A beam search, run when its first delta is asked for, in the shape of a `Stream`."""

    def __init__(self, run: Callable[[], Generation]) -> None:
        self._run = run

    def __iter__(self) -> Iterator[Delta]:
        self._found = self._run()
        for i, found in enumerate(self._found.completions):
            yield Delta(
                index=i,
                tokens=found.tokens,
                logprobs=found.logprobs,
                text=found.text,
                finish_reason=found.finish_reason,
            )

    def stats(self) -> PoolStats:
        """How the pool was used; after the search."""
        return self._found.stats


class Report:
    """What the summary needs to know of a run.

    Attributes:
        started: when it began, in seconds.
        reads: for each read of the stream when it came, in seconds, and its tokens: first those
            that the prompts gave, then those of so many decode steps at a time.
        reasons: why each prompt's completion ended; "" while it grows.
    """

    def __init__(self, num_prompts: int) -> None:
        self.started = time.perf_counter()
        self.reads: list[tuple[float, int]] = []
        self.reasons = [""] * num_prompts
        self._index = num_prompts

    def add(self, index: int, tokens: int, reason: str | None) -> None:
        """Count a delta."""
        # A read tells of each prompt that is still running, in order.
        if index <= self._index:
            self.reads.append((time.perf_counter(), 0))
        when, count = self.reads[-1]
        self.reads[-1] = when, count + tokens
        self._index = index
        if reason:
            self.reasons[index] = reason

    def decoded(self) -> tuple[int, float]:
        """Tokens after the second read, and the seconds they took: by then all is compiled."""
        tokens = sum(count for _, count in self.reads[2:])
        return tokens, self.reads[-1][0] - self.reads[1][0] if tokens else 0.0


@contextlib.contextmanager
def working(log: Console, what: str) -> Iterator[None]:
    """Tells that something takes long: as long as it does, or off a terminal with a line."""
    if not log.is_terminal:
        log.print(f"{what}; new sizes take up to a minute", soft_wrap=True)
    with log.status(what):
        yield


def show_plain(running: Stream | Search, texts: list[str], report: Report, log: Console) -> None:
    """Completions in order of the prompts, each streamed as soon as those before it are done."""
    waiting: list[list[str]] = [[] for _ in texts]
    current = 0
    several = len(texts) > 1

    def begin(i: int) -> None:
        click.echo(f"=== {i + 1}: {texts[i]}" if several else texts[i], nl=several)

    with working(log, "compiling and reading the prompts"):
        news = iter(running)
        first = next(news)
    begin(0)
    for delta in itertools.chain([first], news):
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


def show_live(running: Stream | Search, texts: list[str], report: Report, log: Console) -> None:
    """All completions side by side while they grow; in full at the end."""
    written = [""] * len(texts)
    console = Output()

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

    with working(log, "compiling and reading the prompts"):
        news = iter(running)
        first = next(news)
    room = max(1, console.height // len(texts) - 4)
    live = Live(console=console, transient=True, auto_refresh=False, vertical_overflow="crop")
    with live:
        shown = 0.0
        for delta in itertools.chain([first], news):
            report.add(delta.index, len(delta.tokens), delta.finish_reason)
            written[delta.index] += delta.text
            now = time.perf_counter()
            if now - shown > 1 / _REFRESH_PER_SECOND:
                live.update(panels(room), refresh=True)
                shown = now
    console.print(panels(None))


def _tail(text: str, lines: int | None) -> str:
    """The last lines of a text that has no room for all of them."""
    parts = text.split("\n")
    return text if lines is None or len(parts) <= lines else "\n...\n" + "\n".join(parts[-lines:])


def summary(log: Console, report: Report, stats: PoolStats, max_positions: int) -> None:
    """Print tokens, speed, pages and utilization."""
    table = Table(show_header=False, box=None, pad_edge=False)
    total = sum(count for _, count in report.reads)
    first, last = (report.reads[i][0] - report.started for i in (0, -1))
    table.add_row("tokens", f"{total:,} in {last:.1f} s, the first after {first:.1f} s")
    tokens, seconds = report.decoded()
    if tokens:
        table.add_row(
            "decoding",
            f"{tokens / seconds:,.0f} tokens/s, all prompts together: the last {tokens:,} tokens "
            f"in {seconds:.2f} s (without the prompts and the first steps, which compile)",
        )
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
    if stats.cached_tokens:
        share = stats.cached_tokens / stats.prompt_tokens
        table.add_row(
            "prompts",
            f"{stats.prompt_tokens:,} tokens, of which {stats.cached_tokens:,} ({share:.0%}) were "
            "found in shared pages",
        )
    if stats.drafted:
        share = stats.accepted / stats.drafted
        table.add_row("guesses", f"{stats.accepted:,} of {stats.drafted:,} kept ({share:.0%})")
    log.print(table, highlight=False)


def show_plan(sizes: MemoryPlan, dtype: str) -> None:
    """Print what `memory.plan` found."""
    console = Output(highlight=False)
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("budget", f"{decimal(sizes.memory_bytes)}, weights {decimal(sizes.weight_bytes)}")
    facts.add_row("KV per token", f"{sizes.bytes_per_token:,} bytes ({dtype})")
    facts.add_row(
        "pages", f"{sizes.num_pages:,} of {sizes.page_size} tokens, {decimal(sizes.cache_bytes)}"
    )
    facts.add_row("page table", decimal(sizes.table_bytes))
    facts.add_row("sequences", f"{sizes.mean_len:,} tokens each, at most {sizes.max_len:,}")
    console.print(facts)
    console.print()
    result = Table("", "sequences at once", "of the held slots in use", box=None, pad_edge=False)
    result.add_row("paged", f"{sizes.sequences_paged:,}", f"{sizes.utilization_paged:.1%}")
    result.add_row(
        f"{sizes.max_len:,} reserved for each",
        f"{sizes.sequences_naive:,}",
        f"{sizes.utilization_naive:.1%}",
    )
    console.print(result)
