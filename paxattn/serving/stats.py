"""How a server stands, for its host."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from paxattn.decode_step import Status
from paxattn.page_table import utilization
from paxattn.serving.schedule import available_pages
from paxattn.serving.state import ServeState


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an `Engine` is doing, and did since it was made.

    Attributes:
        running: requests that have a row now.
        waiting: requests that wait for one now.
        num_pages: pages in the pool.
        pages_in_rows: distinct pages that running requests hold now.
        pages_cached: pages that only the prefix cache holds now.
        utilization: fraction of the slots of `pages_in_rows` that hold tokens now; 1 if none.
        num_steps: device steps run.
        preemptions: times a running request had to give its pages back, and was run again.
        cached_tokens: tokens that were not computed, because pages held them.
    """

    running: int
    waiting: int
    num_pages: int
    pages_in_rows: int
    pages_cached: int
    utilization: float
    num_steps: int
    preemptions: int
    cached_tokens: int


def engine_stats(state: ServeState) -> EngineStats:
    """Count; O(num_pages) on the device."""
    table = state.pool.table
    used = utilization(table)
    running = int(jnp.sum(state.owners < state.capacity))
    unfinished = int(jnp.sum(state.requests.status == Status.RUNNING))
    return EngineStats(
        running=running,
        waiting=unfinished - running,
        num_pages=table.num_pages,
        pages_in_rows=int(used.pages_in_rows),
        pages_cached=int(available_pages(state.pool) - table.num_free),
        utilization=float(used.fraction),
        num_steps=int(state.use.num_steps),
        preemptions=int(state.preemptions),
        cached_tokens=int(state.use.cached_tokens),
    )
