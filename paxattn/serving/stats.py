"""How a server stands and how it did, for its host."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from paxattn.decode_step import Status
from paxattn.page_table import utilization
from paxattn.serving.schedule import available_pages
from paxattn.serving.state import ServeState

_FIRST = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
_NEXT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_RECENT = 10.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many of some times lie between which bounds.

    Attributes:
        bounds: seconds, ascending.
        counts: times up to each bound that were above the one before; the last are above all.
        total: sum of the times, seconds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0.0

    @property
    def count(self) -> int:
        """How many times there are."""
        return sum(self.counts)

    def add(self, seconds: float, times: int = 1) -> Histogram:
        """With the same time so often more."""
        counts = list(self.counts)
        counts[bisect_left(self.bounds, seconds)] += times
        return replace(self, counts=tuple(counts), total=self.total + seconds * times)


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an `Engine` is doing, and did since it was made.

    Attributes:
        running: requests that have a row now.
        waiting: requests that wait for one now.
        num_pages: pages in the pool.
        pages_in_rows: distinct pages that running requests hold now.
        pages_shared: how many of them several requests hold.
        pages_cached: pages that only the prefix cache holds now.
        utilization: fraction of the slots of `pages_in_rows` that hold tokens now; 1 if none.
        num_steps: device steps run.
        preemptions: times a running request had to give its pages back, and was run again.
        looked_up_tokens: tokens that the prefix cache was asked for: prompts when they are
            admitted, and what was preempted when it returns.
        cached_tokens: how many of them were not computed, because pages held them.
        prompt_tokens: tokens of the prompts of requests that have begun to generate.
        generated_tokens: tokens handed over.
        tokens_per_second: those of the last ten seconds, per second.
        finished: requests that ended, by `Delta.finish_reason`.
        time_to_first_token: from `Engine.prepare`, which `add_request` begins with, until the first
            token was handed over.
        inter_token_latency: between two tokens of a request; those that are handed over together
            share the time since those before.
    """

    running: int
    waiting: int
    num_pages: int
    pages_in_rows: int
    pages_shared: int
    pages_cached: int
    utilization: float
    num_steps: int
    preemptions: int
    looked_up_tokens: int
    cached_tokens: int
    prompt_tokens: int
    generated_tokens: int
    tokens_per_second: float
    finished: Mapping[str, int]
    time_to_first_token: Histogram
    inter_token_latency: Histogram

    @property
    def prefix_hit_rate(self) -> float:
        """Fraction of `looked_up_tokens` that were `cached_tokens`; 0 without any."""
        return self.cached_tokens / max(1, self.looked_up_tokens)


def counters(state: ServeState) -> dict[str, jax.Array]:
    """What the device counts, 32 bits each: take differences."""
    prefix = state.pool.prefix
    return {
        "num_steps": state.use.num_steps,
        "preemptions": state.preemptions,
        "cached_tokens": state.use.cached_tokens,
        "looked_up_tokens": jnp.int32(0) if prefix is None else prefix.stats.tokens_asked,
    }


@jax.jit
def _standing(state: ServeState) -> dict[str, jax.Array]:
    """How things stand now; O(num_pages)."""
    table, prefix = state.pool.table, state.pool.prefix
    used = utilization(table)
    holders = table.ref_counts if prefix is None else table.ref_counts - (prefix.depths > 0)
    return {
        "running": jnp.sum(state.owners < state.capacity),
        "unfinished": jnp.sum(state.requests.status == Status.RUNNING),
        "pages_in_rows": used.pages_in_rows,
        "pages_shared": jnp.sum(holders > 1),
        "pages_cached": available_pages(state.pool) - table.num_free,
        "utilization": used.fraction,
    }


@dataclass(kw_only=True)
class Meter:
    """Counts what an engine's host sees.

    Attributes:
        device: sums of what the device counts, see `counters`.
        device_last: what it had counted when that was last read.
        finished: see `EngineStats`.
        first: see `EngineStats.time_to_first_token`.
        next: see `EngineStats.inter_token_latency`.
        prompts: see `EngineStats.prompt_tokens`.
        generated: tokens handed over.
    """

    device: Counter[str] = field(default_factory=Counter)
    device_last: Mapping[str, Any] = field(default_factory=dict)
    finished: Counter[str] = field(default_factory=Counter)
    first: Histogram = Histogram(bounds=_FIRST, counts=(0,) * (len(_FIRST) + 1))
    next: Histogram = Histogram(bounds=_NEXT, counts=(0,) * (len(_NEXT) + 1))
    prompts: int = 0
    generated: int = 0
    _recent: deque[tuple[float, float, int]] = field(default_factory=deque)

    def block(self, began: float, now: float, tokens: int, device: Mapping[str, Any]) -> int:
        """A block of device steps has run; how many they were."""
        self.generated += tokens
        self._recent.append((began, now, tokens))
        while self._recent[0][1] < now - _RECENT:
            self._recent.popleft()
        last = self.device_last
        new = {name: (int(n) - int(last.get(name, 0))) % 2**32 for name, n in device.items()}
        self.device_last = device
        self.device.update(new)
        return new["num_steps"]

    def handed_over(self, tokens: int, seconds: float, *, first: bool) -> None:
        """Tokens of one request were handed over, so long after those before."""
        if first:
            self.first = self.first.add(seconds)
        elif tokens:
            self.next = self.next.add(seconds / tokens, tokens)

    def tokens_per_second(self) -> float:
        """See `EngineStats`."""
        now = time.perf_counter()
        recent = [block for block in self._recent if block[1] >= now - _RECENT]
        if not recent:
            return 0.0
        return sum(tokens for *_, tokens in recent) / min(_RECENT, now - recent[0][0])


def engine_stats(state: ServeState, meter: Meter) -> EngineStats:
    """Look at the device, and put everything together; O(num_pages)."""
    now = {name: value.item() for name, value in jax.device_get(_standing(state)).items()}
    unfinished = now.pop("unfinished")
    return EngineStats(
        **now,
        waiting=unfinished - now["running"],
        num_pages=state.pool.table.num_pages,
        **{name: meter.device[name] for name in counters(state)},
        prompt_tokens=meter.prompts,
        generated_tokens=meter.generated,
        tokens_per_second=meter.tokens_per_second(),
        finished=dict(meter.finished),
        time_to_first_token=meter.first,
        inter_token_latency=meter.next,
    )
