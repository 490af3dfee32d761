"""Who runs: admission, shares of a step's tokens, and who leaves when pages run out.

Requests are ranked by priority, then by arrival. The best of those that wait is admitted when a row
and pages for all its tokens are there; nobody overtakes it, so a long prompt is not starved by
short ones. What it will share with running requests needs no pages, and where one of these is about
to store what its prompt begins with too, it waits for that. Pages are not promised to what is not
there yet: running requests take them as they grow, and when none is left the request of the lowest
rank that runs gives its own back and waits again, as often as it takes. One who waits and outranks
one who runs takes its place likewise, a row per step. So the first in rank runs, or comes closer to
running, in every step. What left comes back like any new request, and finds in the prefix cache
what is still there of it (recomputation, as in vLLM, https://arxiv.org/abs/2309.06180, section
4.5).
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from paxattn import prefix_cache
from paxattn.decode_step import Status
from paxattn.page_table.pages import pages_for, read_entries
from paxattn.pool import Pool, admit_rows, leave_behind, make_room
from paxattn.serving.state import Requests, ServeState
from paxattn.step import count_cached

_LOWEST, _HIGHEST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


def of_rows(state: ServeState, field: jax.Array, fill: int = 0) -> jax.Array:
    """A field i32[Q] of the requests that the rows run, i32[R]; ``fill`` for idle rows."""
    return field.at[state.owners].get(mode="fill", fill_value=fill)


def tokens_left(state: ServeState) -> jax.Array:
    """Tokens of each row's request that are not stored, i32[R]: 1 if it is decoding."""
    return of_rows(state, state.requests.num_tokens) - state.pool.table.kv_lens


def outranks(requests: Requests, one: jax.Array, other: jax.Array) -> jax.Array:
    """Whether requests ``one`` come before ``other`` ones; not where either is out of range."""

    def read(field: jax.Array, index: jax.Array) -> jax.Array:
        return field.at[index].get(mode="fill", fill_value=0)

    priority, than = read(requests.priority, one), read(requests.priority, other)
    earlier = read(requests.arrival, one) < read(requests.arrival, other)
    inside = (one < requests.status.size) & (other < requests.status.size)
    return inside & ((priority > than) | ((priority == than) & earlier))


def next_waiting(state: ServeState) -> jax.Array:
    """The first in rank of the requests that wait, i32[]; Q: none."""
    requests = state.requests
    waits = (requests.status == Status.RUNNING).at[state.owners].set(False, mode="drop")
    best = jnp.max(jnp.where(waits, requests.priority, _LOWEST))
    arrival = jnp.where(waits & (requests.priority == best), requests.arrival, _HIGHEST)
    return jnp.where(jnp.any(waits), jnp.argmin(arrival).astype(jnp.int32), state.capacity)


def last_running(state: ServeState) -> jax.Array:
    """The row that runs the last in rank, i32[]; R: none runs."""
    runs = state.owners < state.capacity
    priority = of_rows(state, state.requests.priority)
    worst = jnp.min(jnp.where(runs, priority, _HIGHEST))
    arrival = of_rows(state, state.requests.arrival)
    arrival = jnp.where(runs & (priority == worst), arrival, _LOWEST)
    return jnp.where(jnp.any(runs), jnp.argmax(arrival).astype(jnp.int32), runs.size)


def available_pages(pool: Pool) -> jax.Array:
    """Pages that are free or that only the prefix cache holds, i32[]; O(num_pages)."""
    free = pool.table.num_free
    if pool.prefix is None:
        return free
    return free + jnp.sum((pool.prefix.depths > 0) & (pool.table.ref_counts == 1), dtype=jnp.int32)


def promised_pages(state: ServeState) -> jax.Array:
    """Pages that rows will take from the available ones for the tokens they have, i32[]."""
    table, prefix = state.pool.table, state.pool.prefix
    size, stored = table.page_size, table.kv_lens
    left = jnp.maximum(tokens_left(state), 0)
    missing = pages_for(stored + left, size) - pages_for(stored, size)
    held = pages_for(stored, size) - state.pages_behind(stored)
    missing = jnp.minimum(missing, state.most_pages(stored + left) - held)
    # A page that only the cache holds besides comes to be available when the row has its own copy.
    page = read_entries(table, jnp.arange(stored.size), stored // size)
    others = table.ref_counts.at[page].get(mode="fill", fill_value=1) - 1
    if prefix is not None:
        others -= (prefix.depths > 0).at[page].get(mode="fill", fill_value=False)
    copied = (left > 0) & (stored % size > 0) & (others > 0)
    return jnp.sum(missing + copied, dtype=jnp.int32)


def wanted_pages(state: ServeState, request: jax.Array) -> jax.Array:
    """Pages that a waiting request i32[] would take from the available ones now, i32[].

    All that its tokens need, less what it would share with rows: this is not available.
    """
    table, prefix, requests = state.pool.table, state.pool.prefix, state.requests
    tokens = requests.num_tokens[request]
    pages = pages_for(tokens, table.page_size)
    if prefix is None:
        return state.most_pages(tokens)
    found = prefix_cache.match(
        prefix,
        table,
        requests.tokens[request],
        tokens,
        requests.salt[request],
    )
    full = jnp.arange(found.pages.size) < found.num_full
    holders = table.ref_counts.at[found.pages].get(mode="fill", fill_value=0)
    shared = jnp.sum(full & (holders > 1), dtype=jnp.int32)
    return jnp.minimum(pages - shared, state.most_pages(tokens))


def better_later(state: ServeState, request: jax.Array) -> jax.Array:
    """Whether a row of higher rank is storing what a waiting request i32[] begins with, bool[].

    In a few steps it can share those pages. Meanwhile the row may well use all of the budget.
    """
    if state.pool.prefix is None:
        return jnp.bool_(False)
    requests, size = state.requests, state.pool.table.page_size
    lines = requests.tokens.at[state.owners].get(mode="clip")
    place = jnp.arange(lines.shape[1], dtype=jnp.int32)
    most = jnp.minimum(of_rows(state, requests.num_tokens), requests.num_tokens[request] - 1)
    alike = (lines == requests.tokens[request]) & (place < most[:, None])
    common = jnp.min(jnp.where(alike, place.size, place), axis=1) // size * size
    friends = outranks(requests, state.owners, request)
    friends &= of_rows(state, requests.salt) == requests.salt[request]
    return jnp.any(friends & (state.pool.table.kv_lens < common))


def to_bring_back(state: ServeState) -> jax.Array:
    """The first who waits, if the host has its pages and there is room for them, i32[]; Q: none."""
    nobody = jnp.int32(state.capacity)

    def look() -> jax.Array:
        head = next_waiting(state)
        tokens = state.requests.num_tokens.at[head].get(mode="fill", fill_value=0)
        away = state.away.at[head].get(mode="fill", fill_value=0)
        idle = state.owners == state.capacity
        room = available_pages(state.pool) - promised_pages(state) - state.policy.watermark
        wanted = pages_for(tokens, state.pool.table.page_size) - state.pages_behind(away)
        enough = jnp.minimum(wanted, state.most_pages(tokens)) <= room
        fits = jnp.any(idle) & (enough | jnp.all(idle))
        return jnp.where(fits & (away > 0), head, nobody)

    return lax.cond(jnp.any(state.away > 0), look, lambda: nobody)


def admit(state: ServeState) -> ServeState:
    """Give rows to those that wait, in order of rank, while there are rows and pages.

    Pages count that are free or only cached, less what rows still need for the tokens they have.
    What is counted stays there until the next request: a row holds the cached pages that it starts
    on from here on, and nothing is evicted in between.
    """

    def fits(state: ServeState) -> jax.Array:
        head = next_waiting(state)
        idle = state.owners == state.capacity

        def pages_allow() -> jax.Array:
            room = available_pages(state.pool) - promised_pages(state) - state.policy.watermark
            enough = wanted_pages(state, head) <= room
            return (enough | jnp.all(idle)) & ~better_later(state, head)  # alone, it has all

        here = state.away.at[head].get(mode="fill", fill_value=1) == 0  # else the host brings it
        possible = here & jnp.any(idle)
        return lax.cond(possible, pages_allow, lambda: possible)

    def body(state: ServeState) -> ServeState:
        head = next_waiting(state)
        row = jnp.argmax(state.owners == state.capacity)
        requests, width = state.requests, state.requests.tokens.shape[1]
        start = jnp.arange(state.owners.size) == row
        salts = state.pool.salts.at[row].set(requests.salt[head])
        pool = admit_rows(
            replace(state.pool, salts=salts),
            start,
            requests.tokens.reshape(-1),
            jnp.where(start, head * width, 0),
            jnp.where(start, requests.num_tokens[head], 0),
        )
        pool = leave_behind(pool, state.window, scrub=False)  # cached: nothing comes to be free
        found = jnp.where(start, pool.table.kv_lens, 0)
        cached = requests.cached_tokens
        first = jnp.where(cached[head] < 0, pool.table.kv_lens[row], cached[head])
        return replace(
            state,
            pool=pool,
            owners=state.owners.at[row].set(head),
            requests=replace(requests, cached_tokens=cached.at[head].set(first)),
            use=count_cached(state.use, found),
        )

    return lax.while_loop(fits, body, state)


def share_budget(state: ServeState) -> jax.Array:
    """How many tokens each row runs in this step, i32[R].

    Rows that are decoding run their one token; what is left of the budget stores prompts, those
    first in rank first. The budget has a token for each row, so the first in rank always runs.
    """
    budget = jnp.clip(state.policy.token_budget, state.owners.size, state.step_tokens)
    todo = tokens_left(state)
    decoding = todo == 1
    left = budget - jnp.sum(decoding, dtype=jnp.int32)
    ahead = outranks(state.requests, state.owners[:, None], state.owners[None, :])
    waits = jnp.where(ahead & ~decoding[:, None], todo[:, None], 0)
    before = jnp.sum(waits, axis=0, dtype=jnp.int32)
    return jnp.where(decoding, 1, jnp.clip(left - before, 0, jnp.maximum(todo, 0)))


def leave(state: ServeState, row: jax.Array, status: jax.Array, *, scrub: bool) -> ServeState:
    """Take the row i32[] from its request, which then has this status; R: from nobody."""
    mask = jnp.arange(state.owners.size) == row
    owner = jnp.where(mask, state.owners, state.capacity)
    preempted = jnp.any(mask) & (status == Status.RUNNING)
    statuses = state.requests.status.at[owner].set(status, mode="drop")
    return replace(
        state,
        pool=state.released(mask, scrub=scrub),
        owners=jnp.where(mask, state.capacity, state.owners),
        requests=replace(state.requests, status=statuses),
        preemptions=state.preemptions + preempted.astype(jnp.int32),
    )


def make_way(state: ServeState, *, scrub: bool) -> tuple[ServeState, jax.Array]:
    """Find pages for the step's tokens; the last in rank leave until there are enough.

    A request that finds no page for one token though it is alone can never run, and ends. (More
    tokens at a time take more pages if the model has a window: what it has left behind comes to be
    free after the step.) Where one would leave whose pages are worth moving, nobody runs: the host
    comes first.

    Args:
        state: after `admit`.
        scrub: static; zero the pages that nobody holds any more.

    Returns:
        The state, in which every row has the room it needs; and i32[R], the tokens it runs.
    """
    waits, nobody = jnp.int32(Status.RUNNING), jnp.int32(state.owners.size)

    def body(carry: tuple) -> tuple:
        state, leaving, status, q_lens, _ = carry
        state = leave(state, leaving, status, scrub=scrub)
        alone = jnp.sum(state.owners < state.capacity) == 1
        again = alone & (leaving == nobody) & jnp.any(q_lens > 1)
        q_lens = jnp.where(again, q_lens // 2, share_budget(state))
        pool, ok = make_room(state.pool, q_lens, max_new_tokens=state.step_tokens, scrub=scrub)
        state = replace(state, pool=pool)
        settled = jnp.all(ok)
        fewer = alone & jnp.any(q_lens > 1) & (state.window is not None)
        leaving = jnp.where(settled | fewer, nobody, last_running(state))
        status = jnp.where(alone, jnp.int32(Status.OUT_OF_PAGES), waits)
        moves = ~alone & worth_moving(state, leaving)
        state = replace(state, leaving=jnp.where(moves, leaving, nobody))
        q_lens = jnp.where(moves, 0, q_lens)
        return state, leaving, status, q_lens, settled | moves

    last = last_running(state)
    owner = state.owners.at[last].get(mode="fill", fill_value=state.capacity)
    head = next_waiting(state)
    displaced = outranks(state.requests, head, owner)
    displaced = lax.cond(displaced, lambda: ~better_later(state, head), lambda: displaced)
    leaving = jnp.where(displaced, last, nobody)
    moves = worth_moving(state, leaving)
    state = replace(state, leaving=jnp.where(moves, leaving, nobody))
    carry = (state, leaving, waits, jnp.zeros_like(state.owners), moves)
    state, _, _, q_lens, _ = lax.while_loop(lambda carry: ~carry[-1], body, carry)
    return state, q_lens


def worth_moving(state: ServeState, row: jax.Array) -> jax.Array:
    """Whether the host is to move a row's pages, bool[]; not where it is out of range."""
    stored = state.pool.table.kv_lens.at[row].get(mode="fill", fill_value=0)
    return (stored > 0) & (stored >= state.policy.offload_from)
