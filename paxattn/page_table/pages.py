"""What the steps share: reading block tables, counting, and giving up holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.page_table.state import INT32_MAX, PageTable


def read_entries(table: PageTable, rows: Array, cols: Array) -> Array:
    """Block table entries; the sentinel where a row or column is past the end (never negative)."""
    # One flat index is much cheaper than index pairs, which XLA's CPU back end builds first.
    width = table.max_pages_per_seq
    flat = jnp.where((rows < table.max_seqs) & (cols < width), rows * width + cols, INT32_MAX)
    return table.block_tables.reshape(-1).at[flat].get(mode="fill", fill_value=table.num_pages)


def pages_of(block_tables: Array, rows: Array, counts: Array, num_pages: int) -> Array:
    """The first `counts[i]` pages of row `rows[i]`, padded by the sentinel."""
    entries = jnp.arange(block_tables.shape[1], dtype=jnp.int32)
    pages = block_tables.at[rows].get(mode="fill", fill_value=num_pages)
    return jnp.where(entries < counts[:, None], pages, num_pages)


def pages_for(tokens: Array, page_size: int) -> Array:
    """Pages that hold so many tokens."""
    return (tokens + (page_size - 1)) // page_size


def in_use(ref_counts: Array, pages: Array, mask: Array) -> Array:
    """Which masked pages are in range and held by somebody."""
    inside = mask & (pages >= 0) & (pages < ref_counts.size)
    pages = jnp.where(inside, pages, ref_counts.size)
    return ref_counts.at[pages].get(mode="fill", fill_value=0) > 0


def after_reads(table: PageTable, mask: Array) -> Array:
    """The mask unchanged, but XLA cannot know: lengths are never negative.

    What made the lengths (`append`) read the table. A step whose writes depended on nothing of it
    could come before those reads, and XLA would copy the pool to allow that.
    """
    return mask & jnp.all(table.kv_lens >= 0)


def running_sum(x: Array) -> Array:
    """Inclusive cumulative sum of i32[K], exact.

    `jnp.cumsum` becomes a dozen kernels on a CPU, several microseconds; sums over pieces fuse.
    """
    width = 16
    if x.size <= width:
        return jnp.sum(jnp.where(jnp.tri(x.size, dtype=bool), x, 0), axis=1, dtype=jnp.int32)
    pieces = jnp.pad(x, (0, -x.size % width)).reshape(-1, width)
    inner = jnp.where(jnp.tri(width, dtype=bool), pieces[:, None, :], 0)
    inner = jnp.sum(inner, axis=-1, dtype=jnp.int32)
    ends = running_sum(inner[:, -1])
    return (inner + (ends - inner[:, -1])[:, None]).reshape(-1)[: x.size]


def running_sum_up_to(x: Array, most: int) -> Array:
    """Inclusive cumulative sum of i32[K] numbers in 0..most, that stops at `most`: no overflow."""
    return lax.associative_scan(lambda a, b: jnp.minimum(a, most - b) + b, x)


def is_vacant(table: PageTable, rows: Array) -> Array:
    """Whether rows (never negative) hold neither pages nor tokens; not where there is no such row.

    A row that has discarded its beginning has no page in its first entry either.
    """
    first = table.block_tables.at[rows, 0].get(mode="fill", fill_value=0)
    length = table.kv_lens.at[rows].get(mode="fill", fill_value=1)
    return (first == table.num_pages) & (length == 0)


def give_up(
    ref_counts: Array, free_pages: Array, num_free: Array, pages: Array, mask: Array
) -> tuple[Array, Array, Array]:
    """Takes one hold from each masked page of `pages` i32[K], and frees those left by everybody.

    Every step that gives up holds does it here. Each mention counts as a hold of its own; pages
    out of range or free already are ignored, and no count goes below zero. O(K), with no scratch
    of the pool's size: the mentions of an emptied page settle which of them pushes it by a
    scatter-max into the page's own count, which is 0 afterwards anyway.

    `when` skips work, but it also orders reads of `ref_counts` before the writes that follow: what
    a loop starts with is computed once, before it. Otherwise XLA may fuse a read into several
    later users, find the old array still alive at the write, and copy the pool.
    """
    num_pages = ref_counts.size
    if pages.size == 0:
        return ref_counts, free_pages, num_free
    held = jnp.where(in_use(ref_counts, pages, mask), pages, num_pages)

    def lose(ref_counts: Array, free_pages: Array, num_free: Array) -> tuple[Array, ...]:
        ref_counts = ref_counts.at[held].add(-1, mode="drop")
        empty = ref_counts.at[held].get(mode="fill", fill_value=1) <= 0
        emptied = jnp.where(empty, held, num_pages)

        def push(ref_counts: Array, free_pages: Array, num_free: Array) -> tuple[Array, ...]:
            claims = jnp.arange(1, held.size + 1, dtype=jnp.int32)
            ref_counts = ref_counts.at[emptied].max(claims, mode="drop")
            won = ref_counts.at[emptied].get(mode="fill", fill_value=0) == claims
            order = running_sum(won.astype(jnp.int32))
            won = jnp.diff(order, prepend=0) > 0  # again from `order`: see above
            page = jnp.where(won, emptied, num_pages)
            top = jnp.where(won, num_free + order - 1, num_pages)
            return (
                ref_counts.at[page].set(0, mode="drop"),
                free_pages.at[top].set(page, mode="drop"),
                num_free + order[-1],
            )

        state = (ref_counts, free_pages, num_free)
        return when(jnp.any(emptied < num_pages), push, *state)

    state = (ref_counts, free_pages, num_free)
    return when(jnp.any(held < num_pages), lose, *state)


def when(wanted: Array, step: Callable[..., tuple], *state: Any) -> Any:
    """`step(*state)` if it is wanted, bool[], else the state as it is: in place.

    A loop of one turn at most. `lax.cond` would say the same, but XLA may copy what goes through
    its branches, in every turn of a loop around it: pages and all that is said of them. (Seen with
    jax 0.10, where the bound of that loop was data. Not a `fori_loop`: its counter costs 2 us.)
    """

    def turn(carry: tuple) -> tuple:
        return varying_like(jnp.zeros((), bool), wanted), step(*carry[1])

    return lax.while_loop(lambda carry: carry[0], turn, (wanted, state))[1]


def varying_like(x: Array, *others: Array) -> Array:
    """Lets `x` vary over the mesh axes that any of the others does.

    Inside `shard_map`, what a loop starts with must be typed like what its body makes of it, and
    both branches of a condition alike. Elsewhere it does nothing.
    """
    axes = {a for other in others for a in jax.typeof(other).manual_axis_type.varying}
    axes -= jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(axes), to="varying") if axes else x


def leaves(table: PageTable, *others: Array) -> tuple[Array, ...]:
    """The arrays of a table, as operands for `when`: varying as any of them or the others."""
    arrays = (
        table.block_tables,
        table.kv_lens,
        table.ref_counts,
        table.free_pages,
        table.num_free,
    )
    return tuple(varying_like(x, *arrays, *others) for x in arrays)


def with_leaves(table: PageTable, state: tuple[Array, ...]) -> PageTable:
    """The table with these arrays, in the order of `leaves`."""
    block_tables, kv_lens, ref_counts, free_pages, num_free = state
    return PageTable(
        block_tables=block_tables,
        kv_lens=kv_lens,
        ref_counts=ref_counts,
        free_pages=free_pages,
        num_free=num_free,
        page_size=table.page_size,
    )
