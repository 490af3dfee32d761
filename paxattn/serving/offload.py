"""Pages in the host's memory: what a request had stored when it had to give its row up.

Storing it anew takes the model, moving it only bandwidth. The device loop cannot move pages out of
its memory, so it ends before a row of so many tokens would have to leave (`Policy.offload_from`),
and says which; between two blocks of steps the host takes that row's pages, those that its window
still sees, and brings back those of the first who waits as soon as there is room. A request says
the same as if it had stored its tokens anew.

Where the device can address the host's memory ("pinned_host" among its memory kinds: GPUs, TPUs and
CPUs can), pages go there, and come back, without the host waiting for them.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxattn import page_table
from paxattn.decode_step import Status
from paxattn.kv_cache import KVCache
from paxattn.packing import bucket
from paxattn.page_table.pages import pages_for, read_entries
from paxattn.pool import make_room
from paxattn.serving.schedule import leave, to_bring_back
from paxattn.serving.state import NEVER, ServeState, init_serve, new_request, put
from paxattn.serving.step import serve

_HOST = "pinned_host"


def take_out(state: ServeState, *, scrub: bool) -> tuple[ServeState, jax.Array, KVCache, jax.Array]:
    """Take the row that is to leave from its request.

    Returns:
        The state; the request's place i32[]; the row's pages, without those that its window has
        left behind, and others after them, ``max_pages_per_seq`` in all; and how many are the
        row's, i32[].
    """
    row, table = state.leaving, state.pool.table
    place = state.owners.at[row].get(mode="fill", fill_value=state.capacity)
    stored = table.kv_lens.at[row].get(mode="fill", fill_value=0)
    pages = seen_pages(state, row, stored)
    taken = jax.tree.map(
        lambda pool: pool.at[:, pages].get(mode="fill", fill_value=0), state.pool.cache
    )
    count = pages_for(stored, table.page_size) - state.pages_behind(stored)
    state = leave(state, row, jnp.int32(Status.RUNNING), scrub=scrub)
    away = state.away.at[place].set(stored, mode="drop")
    state = replace(state, away=away, leaving=jnp.int32(state.owners.size))
    return state, place, taken, count


def seen_pages(state: ServeState, row: jax.Array, stored: jax.Array) -> jax.Array:
    """A row's pages from the first that a window still sees, padded: i32[max_pages_per_seq]."""
    table = state.pool.table
    cols = state.pages_behind(stored) + jnp.arange(table.max_pages_per_seq)
    return read_entries(table, row, cols)


def bring_back(state: ServeState, place: jax.Array, taken: KVCache, *, scrub: bool) -> ServeState:
    """Let a request i32[] go on in a row, with the pages that `take_out` gave.

    Where there is no room after all, it stores its tokens anew.
    """
    row, table = jnp.argmax(state.owners == state.capacity), state.pool.table
    mine = jnp.arange(state.owners.size) == row
    stored, away = state.away[place], state.away.at[place].set(0)
    # The row begins as one that has left behind what its window had.
    behind = state.pages_behind(stored) * table.page_size
    table = replace(table, kv_lens=jnp.where(mine, behind, table.kv_lens))
    tokens = jnp.where(mine, stored - behind, 0)
    salts = jnp.where(mine, state.requests.salt[place], state.pool.salts)
    most = table.max_pages_per_seq * table.page_size
    pool = replace(state.pool, table=table, salts=salts)
    pool, ok = make_room(pool, tokens, max_new_tokens=most, scrub=scrub)
    table, _ = page_table.append(pool.table, jnp.where(ok, tokens, 0))
    table = replace(table, kv_lens=jnp.where(mine & ~ok, 0, table.kv_lens))
    state = replace(state, pool=replace(pool, table=table), away=away)
    pages = seen_pages(state, row, stored)  # none if there was no room
    cache = jax.tree.map(
        lambda all_, new: all_.at[:, pages].set(new, mode="drop"), pool.cache, taken
    )
    owners = jnp.where(mine & ok, place, state.owners)
    return replace(state, pool=replace(state.pool, cache=cache), owners=owners)


_take_out = jax.jit(take_out, donate_argnames="state", static_argnames="scrub")
_to_bring_back = jax.jit(to_bring_back)
_bring_back = jax.jit(bring_back, donate_argnames="state", static_argnames="scrub")


class HostPages:
    """The pages that the host has, by their request's place.

    Attributes:
        moved: times that a request's pages were moved out so far.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.moved = 0
        self._pages: dict[int, KVCache] = {}

    def between_blocks(self, state: ServeState, *, scrub: bool) -> ServeState:
        """Move pages out and in; call it before every block of steps.

        Args:
            state: is donated.
            scrub: see `serve_step`.
        """
        if int(state.leaving) < state.owners.size:
            state, place, taken, count = _take_out(state, scrub=scrub)
            few = _resized(taken, count=min(bucket(int(count)), taken.num_pages))
            self._pages[int(place)] = jax.tree.map(to_host, few)
            self.moved += 1
        if self._pages:
            away = np.asarray(state.away)
            self._pages = {place: own for place, own in self._pages.items() if away[place]}
        while self._pages and (place := int(_to_bring_back(state))) < state.capacity:
            kept = jax.tree.map(to_device, self._pages.pop(place), state.pool.cache)
            whole = _resized(kept, count=state.pool.table.max_pages_per_seq)
            state = _bring_back(state, np.int32(place), whole, scrub=scrub)
        return state


def to_host(pages: jax.Array) -> jax.Array | np.ndarray:
    """An array in the host's memory."""
    kinds = {memory.kind for device in pages.devices() for memory in device.addressable_memories()}
    if _HOST not in kinds:
        return np.asarray(pages)
    return jax.device_put(pages, pages.sharding.with_memory_kind(_HOST))


def to_device(pages: jax.Array | np.ndarray, like: jax.Array) -> jax.Array:
    """An array from `to_host`, where another lies."""
    return jax.device_put(pages, like.sharding)


@partial(jax.jit, static_argnames="count")
def _resized(pages: KVCache, *, count: int) -> KVCache:
    """Pages cut, or followed by zeros, to so many of each layer."""
    more = max(count - pages.num_pages, 0)
    return jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))[:, :count], pages
    )


def pays_from(model: Any, state: ServeState) -> int:
    """From how many tokens on moving pages takes less time than storing the tokens anew.

    Measured on this machine, in a server of one row beside the given one.

    Args:
        model: see `serve_step`.
        state: says the sizes; it is not changed.

    Returns:
        Tokens, for `Policy.offload_from`; more than a request may have if it never pays.
    """
    tokens, page_size = state.requests.tokens.shape[1], state.pool.table.page_size
    if tokens < 3:
        return NEVER
    run = jax.jit(serve, donate_argnames="state")
    stored = moved = 0.0
    for _ in range(2):  # the first time compiles
        one = init_serve(
            model,
            num_pages=-(-tokens // page_size),
            page_size=page_size,
            max_seqs=1,
            max_requests=1,
            max_tokens=tokens,
            step_tokens=state.step_tokens,
            remember=False,
            kv_dtype=state.pool.cache.k_pages.dtype,
        )
        request = new_request(one, [0] * (tokens - 2), max_new_tokens=2)
        one = replace(one, requests=put(one.requests, jnp.int32(0), request))
        began = time.perf_counter()
        steps = np.int32(-(-(tokens - 2) // state.step_tokens))
        one = jax.block_until_ready(run(model, one, steps))
        stored = time.perf_counter() - began
        one = replace(one, leaving=jnp.int32(0))
        began = time.perf_counter()
        one = jax.block_until_ready(HostPages().between_blocks(one, scrub=False))
        moved = time.perf_counter() - began
    return int(moved / stored * tokens) + 1
