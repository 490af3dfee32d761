"""The steps that share pages between rows, and with holders that are no rows."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from paxattn.page_table.inputs import as_integers, as_mask
from paxattn.page_table.pages import (
    after_reads,
    give_up,
    in_use,
    is_vacant,
    leaves,
    pages_for,
    pages_of,
    when,
    with_leaves,
)
from paxattn.page_table.state import PageTable


def fork(table: PageTable, src: ArrayLike, dst: ArrayLike) -> tuple[PageTable, Array]:
    """Lets empty rows `dst` start as copies of rows `src`, sharing their pages.

    A fork shares the `ceil(kv_len / page_size)` pages that hold its source's tokens, not the spare
    ones reserved beyond. Nothing is copied until one of the sharers writes (see `reserve`). All
    pairs read the table as it was before the step.

    Args:
      table: the table.
      src: i32[R'], rows to share; they may be empty.
      dst: i32[R'], rows that hold no pages.

    Returns:
      The table and `ok` bool[R']: not ok, and without effect, where a row is out of range (so
      padding by `max_seqs` or -1 is fine), where `src == dst`, where `dst` holds pages, or where
      an earlier pair that is ok has the same `dst`.
    """
    src = as_integers("src", src, None)
    dst = as_integers("dst", dst, src.shape)
    table = with_leaves(table, leaves(table, src, dst))
    max_seqs = table.max_seqs
    ok = (src >= 0) & (src < max_seqs) & (dst >= 0) & (dst < max_seqs) & (src != dst)
    # Out-of-range indices are masked before they are used: a negative one would wrap round.
    ok &= is_vacant(table, jnp.where(ok, dst, max_seqs))
    turn = jnp.arange(src.size, dtype=jnp.int32)
    to = jnp.where(ok, dst, max_seqs)
    winner = jnp.full((max_seqs,), src.size, jnp.int32).at[to].min(turn, mode="drop")
    ok &= winner.at[to].get(mode="fill", fill_value=-1) == turn

    source = jnp.where(ok, src, max_seqs)
    lens = table.kv_lens.at[source].get(mode="fill", fill_value=0)
    to = jnp.where(lens > 0, to, max_seqs)

    def share(block_tables: Array, kv_lens: Array, ref_counts: Array) -> tuple[Array, ...]:
        pages = pages_of(block_tables, source, pages_for(lens, table.page_size), table.num_pages)
        return (
            block_tables.at[to].set(pages, mode="drop"),
            kv_lens.at[to].set(lens, mode="drop"),
            ref_counts.at[pages].add(1, mode="drop"),
        )

    state = (table.block_tables, table.kv_lens, table.ref_counts)
    block_tables, kv_lens, ref_counts = when(jnp.any(lens > 0), share, *state)
    return replace(table, block_tables=block_tables, kv_lens=kv_lens, ref_counts=ref_counts), ok


def reorder(table: PageTable, parents: ArrayLike, mask: ArrayLike) -> PageTable:
    """Turns masked rows into forks of their parents, all at once: beam search in one step.

    Row r in `mask` comes to hold exactly the `ceil(kv_len / page_size)` pages with the tokens of
    row `parents[r]` as it was before the step, also where `parents[r] == r`. What it held is given
    up, and pages that nobody holds any more become free.

    Args:
      table: the table.
      parents: i32[R]; where it is out of range, the row stays as it is.
      mask: bool[R], rows to replace.

    Returns:
      The table.
    """
    parents = as_integers("parents", parents, (table.max_seqs,))
    moves = as_mask("mask", mask, (table.max_seqs,)) & (parents >= 0) & (parents < table.max_seqs)
    parents = jnp.where(moves, parents, table.max_seqs)

    def move(
        block_tables: Array, kv_lens: Array, ref_counts: Array, free_pages: Array, num_free: Array
    ) -> tuple[Array, ...]:
        lens = kv_lens.at[parents].get(mode="fill", fill_value=0)
        counts = pages_for(lens, table.page_size)
        pages = pages_of(block_tables, parents, counts, table.num_pages)
        # New holds first: a page that a row passes on must not become free in between.
        ref_counts = ref_counts.at[pages].add(1, mode="drop")
        old = jnp.broadcast_to(moves[:, None], pages.shape).reshape(-1)
        pools = give_up(ref_counts, free_pages, num_free, block_tables.reshape(-1), old)
        moved = moves & (pools[2] >= 0)  # always: but now the write comes after the reads
        return (
            jnp.where(moved[:, None], pages, block_tables),
            jnp.where(moved, lens, kv_lens),
            *pools,
        )

    return with_leaves(table, when(jnp.any(moves), move, *leaves(table, moves)))


def adopt(
    table: PageTable, row: ArrayLike, pages: ArrayLike, num_tokens: ArrayLike
) -> tuple[PageTable, Array]:
    """Starts an empty row on pages that somebody (the prefix cache) holds.

    Args:
      table: the table.
      row: i32[], a row that holds no pages.
      pages: i32[K], K <= max_pages_per_seq; the first `ceil(num_tokens / page_size)` are taken,
        each mention as a hold of its own, and the rest are ignored.
      num_tokens: i32[], tokens that those pages hold: the row's length.

    Returns:
      The table and `ok` bool[]: not ok, and without effect, where `row` is out of range or holds
      pages, where a page taken is out of range or free, or where `num_tokens` is negative or more
      than K pages hold.
    """
    row = as_integers("row", row, ())
    num_tokens = as_integers("num_tokens", num_tokens, ())
    pages = as_integers("pages", pages, None)
    table = with_leaves(table, leaves(table, row, num_tokens, pages))
    size, num_pages = pages.size, table.num_pages
    if size > table.max_pages_per_seq:
        raise ValueError(
            f"pages has {size} entries, but a row has {table.max_pages_per_seq=}: pass fewer"
        )
    ok = after_reads(table, (row >= 0) & (row < table.max_seqs))
    ok &= (num_tokens >= 0) & (num_tokens <= size * table.page_size)
    num_tokens = jnp.where(ok, num_tokens, 0)
    used = jnp.arange(size, dtype=jnp.int32) < pages_for(num_tokens, table.page_size)
    pages = jnp.where(used & (pages >= 0) & (pages < num_pages), pages, num_pages)
    holders = table.ref_counts.at[pages].get(mode="fill", fill_value=0)
    ok &= jnp.all((holders > 0) | ~used)
    ok &= is_vacant(table, jnp.where(ok, row, table.max_seqs))
    row = jnp.where(ok, row, table.max_seqs)
    pages = jnp.where(ok, pages, num_pages)
    padded = jnp.pad(pages, (0, table.max_pages_per_seq - size), constant_values=num_pages)

    def start(block_tables: Array, kv_lens: Array, ref_counts: Array) -> tuple[Array, ...]:
        return (
            block_tables.at[row].set(padded, mode="drop"),
            kv_lens.at[row].set(num_tokens, mode="drop"),
            ref_counts.at[pages].add(1, mode="drop"),
        )

    state = (table.block_tables, table.kv_lens, table.ref_counts)
    block_tables, kv_lens, ref_counts = when(ok, start, *state)
    table = replace(table, block_tables=block_tables, kv_lens=kv_lens, ref_counts=ref_counts)
    return table, ok


def retain(table: PageTable, pages: ArrayLike, mask: ArrayLike) -> PageTable:
    """Adds a holder that is no row (the prefix cache) to each masked page of `pages` i32[K].

    A page mentioned twice is held twice. Pages that are free or out of range are ignored: a free
    page has nothing worth holding. Retain pages whose tokens have been appended, not spare ones:
    a row does not expect to share a page that it reserved and has not begun to write.
    """
    pages = as_integers("pages", pages, None)
    mask = as_mask("mask", mask, pages.shape)
    held = in_use(table.ref_counts, pages, after_reads(table, mask))
    pages = jnp.where(held, pages, table.num_pages)
    return replace(table, ref_counts=table.ref_counts.at[pages].add(1, mode="drop"))


def drop(table: PageTable, pages: ArrayLike, mask: ArrayLike) -> PageTable:
    """Gives up the holds that `retain` took on the masked pages of `pages` i32[K].

    A page mentioned twice loses two holds. Pages that nobody holds any more become free; those
    that are free already or out of range are ignored.
    """
    pages = as_integers("pages", pages, None)
    mask = as_mask("mask", mask, pages.shape)
    table = with_leaves(table, leaves(table, pages, mask))
    ref_counts, free_pages, num_free = give_up(
        table.ref_counts, table.free_pages, table.num_free, pages, after_reads(table, mask)
    )
    return replace(table, ref_counts=ref_counts, free_pages=free_pages, num_free=num_free)
