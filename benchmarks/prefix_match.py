"""What the prefix cache costs, in jitted functions to which cache and table are donated.

`python benchmarks/prefix_match.py [--quick]` prints a table and writes results/prefix_match.json.

The cache is full of prompts of 256 pages of 16 tokens; its sizes differ to show what grows with the
pool. Microseconds per call, and per page where pages are what a call is about:

match      a prompt of 4,096 tokens: cached as a whole (hit), half of it (half), or nothing (miss)
admit      the hit, adopted and marked as used
insert     a row of 4,096 tokens: all its 256 pages are new, the last one is, or none
reserve    1 token for each of 256 rows, the pool not short; page_table.reserve alone for comparison
evict      1/64 of the pool in one call

All cases take turns; figures are medians, with the 10th percentile beside them: on a machine that
is busy with other things the latter says more.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from _common import interleaved, machine, save, show
from jax import lax

from paxattn import page_table as pt
from paxattn import prefix_cache as pc

PAGE_SIZE, LONG, ROWS, BATCH = 16, 256, 256, 16
TOKENS = PAGE_SIZE * LONG
SPARE = (BATCH + 1) * LONG  # pages beside the cached ones: for the rows to insert, and to decode


def prompt(key):
    return jax.random.randint(jax.random.key(key), (TOKENS,), 0, 32_000, jnp.int32)


def first_rows(count, tokens):
    return jnp.where(jnp.arange(ROWS) < count, tokens, 0)


def filled(table, lens):
    table, _, _ = pt.reserve(table, lens, max_new_pages=LONG)
    return pt.append(table, lens)[0]


@jax.jit
def full_cache(cache, table):
    """As many whole prompts as leave SPARE pages, in rows that are gone."""

    def one(i, state):
        cache, table = state
        table = filled(table, first_rows(1, TOKENS))
        cache, table = pc.insert(cache, table, 0, prompt(i))
        return cache, pt.release(table, first_rows(1, 1) > 0)

    return lax.fori_loop(0, table.num_pages // LONG - SPARE // LONG, one, (cache, table))


def timed(function, state, count=1, *, fresh=False):
    """Seconds per call of `function`, which counts what went wrong, on the state it left.

    `fresh`: on a copy of the first state instead. `count`: calls in one loop, as in a decode loop.
    """

    def loop(state):
        def body(i, carry):
            state, wrong = function(i, carry[0])
            return state, carry[1] + wrong.astype(jnp.int32)

        return lax.fori_loop(0, count, body, (state, jnp.int32(0)))

    run = jax.jit(loop if count > 1 else lambda state: function(0, state), donate_argnums=0)
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    kept = [state if fresh else copy(state)]

    def once() -> float:
        state = jax.block_until_ready(copy(kept[0]) if fresh else kept[0])
        begin = time.perf_counter()
        state, wrong = jax.block_until_ready(run(state))
        took = time.perf_counter() - begin
        if int(wrong):
            raise RuntimeError(f"{int(wrong)} calls did not do what this benchmark is about")
        if not fresh:
            kept[0] = state
        return took / count

    return once


def matching(tokens, expected):
    def match(i, state):
        # A length the compiler cannot know, so that the call stays in the loop.
        found = pc.match(*state, tokens, TOKENS + jnp.minimum(i, 0))
        return state, found.num_tokens != expected

    return match


def admitting(tokens):
    def admit(_, state):
        def one(row, carry):
            cache, table, wrong = carry
            cache, table, done = pc.admit(cache, table, row, tokens, TOKENS)
            return cache, table, wrong + (done != TOKENS - 1)

        *state, wrong = lax.fori_loop(0, BATCH, one, (*state, jnp.int32(0)))
        return tuple(state), wrong

    return admit


def inserting(tokens, expected):
    def insert(_, state):
        before = state[0].stats.pages_inserted
        cache, table = pc.insert_rows(
            *state, first_rows(BATCH, 1) > 0, tokens, jnp.zeros((ROWS,), jnp.int32)
        )
        wrong = cache.stats.pages_inserted - before != BATCH * expected
        return (cache, table), wrong

    return insert


def reserving(with_cache):
    def step(_, state):
        cache, table = state
        one = jnp.ones((ROWS,), jnp.int32)
        if with_cache:
            cache, table, ok, copies = pc.reserve(cache, table, one)
        else:
            table, ok, copies = pt.reserve(table, one)
        table, fine = pt.append(table, one)
        return (cache, table), jnp.sum(~(ok & fine), dtype=jnp.int32) + copies.count

    return step


def evicting(count):
    def evict(_, state):
        cache, table, freed = pc.evict(*state, count)
        return (cache, table), freed != count

    return evict


def cases(num_pages, loops):
    """Per name: a function, and the pages that a call of it is about."""
    pool = num_pages + SPARE
    table = pt.init_page_table(
        num_pages=pool, page_size=PAGE_SIZE, max_seqs=ROWS, max_pages_per_seq=LONG
    )
    cache, table = full_cache(pc.init_prefix_cache(num_pages=pool, page_size=PAGE_SIZE), table)
    state = (cache, table)
    other = prompt(10**6)
    half = jnp.where(jnp.arange(TOKENS) < TOKENS // 2, prompt(1), other)

    # Rows full of tokens; the same one page ago, remembered; and with all of it remembered.
    tokens = jax.vmap(prompt)(2 * 10**6 + jnp.arange(ROWS))
    everything = jax.jit(filled)(table, first_rows(BATCH, TOKENS))
    nearly = jax.jit(filled)(table, first_rows(BATCH, TOKENS - PAGE_SIZE))
    insert = jax.jit(lambda *state: inserting(tokens, LONG)(0, state)[0])
    cached_nearly = insert(cache, nearly)
    cached_nearly = (
        cached_nearly[0],
        jax.jit(filled)(cached_nearly[1], first_rows(BATCH, PAGE_SIZE)),
    )
    # Rows at lengths 1 to page_size; as many steps as fill their first page.
    lens = np.arange(ROWS, dtype=np.int32) % PAGE_SIZE + 1
    decoding = (cache, jax.jit(filled)(table, lens))
    steps = SPARE // ROWS * PAGE_SIZE - 2 * PAGE_SIZE
    share = num_pages // pc.EVICTION_SHARE
    return {
        "match hit": (timed(matching(prompt(0), TOKENS - 1), state, loops), 0),
        "match half": (timed(matching(half, TOKENS // 2), state, loops), 0),
        "match miss": (timed(matching(other, 0), state, loops), 0),
        "admit": (timed(admitting(prompt(0)), state, fresh=True), 0),
        "insert all": (
            timed(inserting(tokens, LONG), (cache, everything), fresh=True),
            BATCH * LONG,
        ),
        "insert last": (timed(inserting(tokens, 1), cached_nearly, fresh=True), BATCH),
        "insert none": (
            timed(inserting(tokens, 0), insert(cache, everything), loops // 10),
            BATCH * LONG,
        ),
        "reserve": (timed(reserving(True), decoding, steps, fresh=True), 0),
        "page_table.reserve": (timed(reserving(False), decoding, steps, fresh=True), 0),
        "evict": (timed(evicting(share), state, fresh=True), share),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    quick = parser.parse_args().quick
    sizes = (4096, 65_536) if quick else (4096, 65_536, 2**18)
    every = {
        (name, size): case
        for size in sizes
        for name, case in cases(size, 20 if quick else 100).items()
    }
    times = interleaved({str(key): once for key, (once, _) in every.items()}, 10 if quick else 30)
    rows = []
    for key, (_, pages) in every.items():
        name, size = key
        calls = BATCH if name.startswith(("admit", "insert")) else 1
        us = {k: times[str(key)][k] * 1e6 for k in ("median", "low")}
        rows.append(
            {
                "case": name,
                "cached pages": size,
                "us a call": round(us["median"] / calls, 2),
                "p10": round(us["low"] / calls, 2),
                "us a page": round(us["median"] / pages, 3) if pages else "",
            }
        )
    rows.sort(key=lambda row: (row["case"], row["cached pages"]))
    show(f"prefix cache, page_size {PAGE_SIZE}, {machine()}", rows)
    print(f"wrote {save('prefix_match', rows, page_size=PAGE_SIZE)}")


if __name__ == "__main__":
    main()
