"""What the allocator costs: microseconds a step inside a jitted loop that carries a donated table.

`python benchmarks/allocator.py [--quick]` prints a table and writes results/allocator.json.

decode  reserve(1 token) + append(1 token) for every row. Rows are staggered, so that in every step
        rows / page_size of them need a page. Between timed loops the rows are truncated to their
        starting lengths, outside the timing.
copy    reserve in which every row copies: at the start of each step a second holder `retain`s the
        page each row is about to write, and after it `drop`s the old page, which then goes back on
        the stack. The same retain and drop without a reserve, timed apart, are subtracted.
idle    reserve(0 tokens) + append(0 tokens), and release, truncate and fork with nothing to do.

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

PAGE_SIZE = 16


def timed(loop, table, before=lambda table: table):
    """A function that runs `loop` on the table it left the last time, and returns the seconds."""
    run = jax.jit(loop, donate_argnums=0)
    before = jax.jit(before, donate_argnums=0)
    state = [table]

    def once() -> float:
        table = jax.block_until_ready(before(state[0]))
        start = time.perf_counter()
        state[0], bad = jax.block_until_ready(run(table))
        took = time.perf_counter() - start
        if int(bad):
            raise RuntimeError(f"{int(bad)} rows did not do what this benchmark is about")
        return took

    return once


def start(num_pages, rows, width):
    """Rows at lengths 1 to page_size, each with its pages."""
    lens = np.arange(rows, dtype=np.int32) % PAGE_SIZE + 1
    table = pt.init_page_table(
        num_pages=num_pages, page_size=PAGE_SIZE, max_seqs=rows, max_pages_per_seq=width
    )
    table, _, _ = jax.jit(pt.reserve)(table, lens)
    return jax.jit(pt.append)(table, lens)[0], lens


def decode(num_pages, rows, width, steps):
    table, lens = start(num_pages, rows, width)
    one = jnp.ones((rows,), jnp.int32)

    def step(_, carry):
        table, bad = carry
        table, ok, copies = pt.reserve(table, one, max_new_tokens=1)
        table, fine = pt.append(table, one)
        return table, bad | ~(ok & fine) | (copies.count > 0)

    def loop(table):
        table, bad = lax.fori_loop(0, steps, step, (table, one < 0))
        return table, jnp.sum(bad)

    return timed(loop, table, lambda table: pt.truncate(table, lens)[0])


def copying(num_pages, rows, width, steps, *, reserve):
    table, lens = start(num_pages, rows, width)
    # Cut to 1 token, so that the next one goes into the page the row has.
    table = jax.jit(pt.truncate)(table, np.ones_like(lens))[0]
    one = jnp.ones((rows,), jnp.int32)
    everyone = one > 0

    def step(_, carry):
        table, pages, bad = carry
        table, old = pt.retain(table, pages, everyone), pages
        if reserve:
            table, _, copies = pt.reserve(table, one, max_new_tokens=1)
            old, pages = copies.src[:rows], copies.dst[:rows]
            bad += jnp.abs(copies.count - rows)
        return pt.drop(table, old, everyone), pages, bad

    def loop(table):
        table, _, bad = lax.fori_loop(
            0, steps, step, (table, table.block_tables[:, 0], jnp.int32(0))
        )
        return table, bad

    return timed(loop, table)


def idle(num_pages, rows, width, steps):
    table, _ = start(num_pages, rows, width)

    def step(_, carry):
        table, bad = carry
        # Values the compiler cannot know, so that nothing is left out.
        none = jnp.minimum(table.num_free, 0) + jnp.zeros((rows,), jnp.int32)
        table, _, copies = pt.reserve(table, none, max_new_tokens=1)
        table, _ = pt.append(table, none)
        table = pt.release(table, none > 0)
        table, _ = pt.truncate(table, none - 1)
        table, _ = pt.fork(table, none - 1, none)
        return table, bad + copies.count

    def loop(table):
        return lax.fori_loop(0, steps, step, (table, jnp.int32(0)))

    return timed(loop, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    quick = parser.parse_args().quick
    steps, repeats = (500, 20) if quick else (1008, 40)
    sizes = [(4096, 256, 128), (2**20, 256, 128)]
    if not quick:
        sizes += [(65_536, 256, 128), (65_536, 256, 4096), (65_536, 64, 128), (65_536, 1024, 128)]
    cases, rows = {}, []
    for num_pages, num_rows, width in sizes:
        case = (num_pages, num_rows, width)
        # What fits: the rows' pages, for as many steps as the pool and the row's width allow.
        room = min(width, num_pages // num_rows) * PAGE_SIZE - PAGE_SIZE
        cases["decode", *case] = (decode(*case, min(steps, room)), min(steps, room))
        cases["copy", *case] = (copying(*case, steps // 2, reserve=True), steps // 2)
        cases["reshare", *case] = (copying(*case, steps // 2, reserve=False), steps // 2)
        cases["idle", *case] = (idle(*case, steps), steps)
    times = interleaved({str(key): once for key, (once, _) in cases.items()}, repeats)
    for key, (_, count) in cases.items():
        name, num_pages, num_rows, width = key
        if name == "reshare":
            continue
        us = {k: times[str(key)][k] / count * 1e6 for k in ("median", "low")}
        if name == "copy":
            other = times[str(("reshare", *key[1:]))]
            us = {k: us[k] - other[k] / count * 1e6 for k in us}
        rows.append(
            {
                "case": name,
                "rows": num_rows,
                "pages": num_pages,
                "pages per row": width,
                "steps": count,
                "us a step": round(us["median"], 2),
                "p10": round(us["low"], 2),
            }
        )
    rows.sort(key=lambda row: (row["case"], row["rows"], row["pages per row"], row["pages"]))
    show(f"allocator, page_size {PAGE_SIZE}, {machine()}", rows)
    print(f"wrote {save('allocator', rows, page_size=PAGE_SIZE)}")


if __name__ == "__main__":
    main()
