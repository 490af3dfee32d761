"""Pages in the host's memory: what a request had stored when it had to give its row up.

Storing it anew takes the model, moving it only bandwidth. The device loop cannot move pages out of
its memory, so it ends before a row of so many tokens would have to leave (`Policy.offload_from`),
and says which; between two blocks the host takes that row's pages, and brings back those of the
first who waits as soon as there is room. A request says the same as if it had stored its tokens
anew.

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
from paxattn.page_table.pages import pages_for
from paxattn.pool import leave_behind, make_room
from paxattn.serving.schedule import leave, to_bring_back
from paxattn.serving.state import NEVER, ServeState, init_serve, new_request, put
from paxattn.serving.step import serve

_HOST = "pinned_host"


def take_out(state: ServeState, *, scrub: bool) -> tuple[ServeState, jax.Array, KVCache]:
    """Take the row that is to leave from its request.

    Returns:
        The state; the request's place i32[]; and the row's pages, ``max_pages_per_seq`` of them
        with those that it does not hold full of zeros.
    """
    row, table = state.leaving, state.pool.table
    place = state.owners.at[row].get(mode="fill", fill_value=state.capacity)
    pages = table.block_tables.at[row].get(mode="fill", fill_value=table.num_pages)
    taken = jax.tree.map(
        lambda pool: pool.at[:, pages].get(mode="fill", fill_value=0), state.pool.cache
    )
    away = state.away.at[place].set(table.kv_lens.at[row].get(mode="fill"), mode="drop")
    state = leave(state, row, jnp.int32(Status.RUNNING), scrub=scrub)
    return replace(state, away=away, leaving=jnp.int32(state.owners.size)), place, taken


def bring_back(state: ServeState, place: jax.Array, taken: KVCache, *, scrub: bool) -> ServeState:
    """Let a request i32[] go on in a row, with the pages that `take_out` gave.

    Where there is no room after all, it stores its tokens anew.
    """
    row = jnp.argmax(state.owners == state.capacity)
    mine = jnp.arange(state.owners.size) == row
    tokens = jnp.where(mine, state.away[place], 0)
    salts = jnp.where(mine, state.requests.salt[place], state.pool.salts)
    most = state.pool.table.max_pages_per_seq * state.pool.table.page_size
    pool, ok = make_room(replace(state.pool, salts=salts), tokens, max_new_tokens=most, scrub=scrub)
    table, _ = page_table.append(pool.table, jnp.where(ok, tokens, 0))
    pages = jnp.where(ok[row], table.block_tables[row], table.num_pages)
    cache = jax.tree.map(
        lambda all_, new: all_.at[:, pages].set(new, mode="drop"), pool.cache, taken
    )
    pool = leave_behind(replace(pool, table=table, cache=cache), state.window, scrub=scrub)
    owners = jnp.where(mine & ok, place, state.owners)
    return replace(state, pool=pool, owners=owners, away=state.away.at[place].set(0))


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
            table = state.pool.table
            held = int(pages_for(table.kv_lens[state.leaving], table.page_size))
            state, place, taken = _take_out(state, scrub=scrub)
            few = _resized(taken, count=min(bucket(held), table.max_pages_per_seq))
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


def settled(state: ServeState, model: Any) -> ServeState:
    """The state committed to the model's device, if that is one.

    Pages that come back are, and `jax.jit` compiles anew where arguments differ in that.
    """
    arrays = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)]
    devices = {device for array in arrays for device in array.devices()}
    return jax.device_put(state, devices.pop()) if len(devices) == 1 else state


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
