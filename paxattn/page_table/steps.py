"""The steps of a row's own life: room, growth, forgetting at either end, release."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from paxattn.page_table.inputs import as_integers, as_mask, check_positive
from paxattn.page_table.pages import (
    after_reads,
    give_up,
    leaves,
    pages_for,
    read_entries,
    running_sum,
    when,
    with_leaves,
)
from paxattn.page_table.state import INT32_MAX, PageCopies, PageTable


def reserve(
    table: PageTable,
    new_tokens: ArrayLike,
    *,
    max_new_pages: int = 1,
    max_new_tokens: int | None = None,
) -> tuple[PageTable, Array, PageCopies]:
    """Makes room for `new_tokens[r]` tokens beyond `kv_lens[r]`, for all rows at once.

    Pages a row already holds count, so asking twice takes pages once. A row about to write into a
    page that others hold gets its own copy of it (copy-on-write, as in vLLM,
    https://arxiv.org/abs/2309.06180, but decided at the write and on the device); every row that
    copies gives up its hold of the old page, and a page left by all its holders goes back on the
    stack, above the pages this step took, so that it is not handed out before its copy has run.
    A sole holder never copies.

    Rows are served in row order: the first that does not fit in the pool fails, and so do later
    rows that need pages; rows that need none succeed. A row that could never be served takes
    nothing from the others: negative `new_tokens`, more than `max_pages_per_seq` pages, or more
    than the static bound allows.

    Only pages that a row can come to write are looked at: the one holding its next token, and the
    last `max_new_pages` that it needs. Those between are spare pages that it reserved itself, and
    nobody else should hold (see `retain`); `slot_mapping` leaves them out if somebody does.

    Args:
      table: the table.
      new_tokens: i32[R], tokens each row is about to write; 0 leaves a row as it is.
      max_new_pages: static bound on the pages a row may lack; copies do not count.
      max_new_tokens: static bound on `new_tokens`, in place of `max_new_pages`. It looks at no
        more entries of a row than so many tokens can touch: one, for 1 token, which makes a decode
        step about a third cheaper.

    Returns:
      The table, `ok` bool[R], and the copies to run, at most `R * (max_new_pages + 1)`.

    Raises:
      ValueError: `new_tokens` is not one integer per row, or a bound is below 1.
    """
    new_tokens = as_integers("new_tokens", new_tokens, (table.max_seqs,))
    table = with_leaves(table, leaves(table, new_tokens))
    return take_pages(table, *pages_wanted(table, new_tokens, max_new_pages, max_new_tokens))


def pages_wanted(
    table: PageTable,
    new_tokens: ArrayLike,
    max_new_pages: int,
    max_new_tokens: int | None = None,
) -> tuple[Array, Array, Array, Array]:
    """What `reserve` with these arguments would take, were the pool large enough.

    Returns:
      possible bool[R], rows that could be served; then for each of the at most
      `max_new_pages + 1` entries of a row that are looked at: cols i32[R, K], where in the row it
      is; pages i32[R, K], what is there now (`num_pages`: nothing); and wanted bool[R, K], whether
      it takes a page from the pool, because it is missing or because others hold it too.
    """
    new = as_integers("new_tokens", new_tokens, (table.max_seqs,))
    num_pages, page_size = table.num_pages, table.page_size
    touched = table.max_pages_per_seq  # pages into which a row's new tokens can fall
    if max_new_tokens is not None:
        max_new_tokens = check_positive("max_new_tokens", max_new_tokens)
        max_new_pages = -(-max_new_tokens // page_size)
        touched = min(touched, 1 - (1 - max_new_tokens) // page_size)
    span = min(check_positive("max_new_pages", max_new_pages), table.max_pages_per_seq)
    looked_at = min(span + 1, touched)
    rows = jnp.arange(table.max_seqs, dtype=jnp.int32)

    # Compared against the room that is left, because kv_lens + new_tokens could overflow.
    possible = (new >= 0) & (new <= table.max_pages_per_seq * page_size - table.kv_lens)
    if max_new_tokens is not None:
        possible &= new <= max_new_tokens
    new = jnp.where(possible, new, 0)
    needed = jnp.where(new > 0, pages_for(table.kv_lens + new, page_size), 0)
    first = table.kv_lens // page_size
    # The first, and the last that are needed: those past `base`, or with it.
    base = jnp.maximum(first, needed - looked_at)
    step = jnp.arange(looked_at, dtype=jnp.int32)
    cols = jnp.where(step > 0, base[:, None] + step, first[:, None])
    pages = read_entries(table, rows[:, None], cols)
    holders = table.ref_counts.at[pages].get(mode="fill", fill_value=0)
    if looked_at > span:
        # At most `span` pages are needed past `base`. If it is past `first`, then it must be held
        # already, and with it all that come before.
        base_page = read_entries(table, rows, base)
        possible &= (needed - base <= span) | (base_page < num_pages)
    # Missing, or shared and about to be written.
    wanted = (cols < needed[:, None]) & possible[:, None] & ((pages == num_pages) | (holders > 1))
    return possible, cols, pages, wanted


def take_pages(
    table: PageTable, possible: Array, cols: Array, pages: Array, wanted: Array
) -> tuple[PageTable, Array, PageCopies]:
    """Takes what `pages_wanted` said, and returns what `reserve` does."""
    num_pages = table.num_pages
    rows = jnp.arange(table.max_seqs, dtype=jnp.int32)
    running = running_sum(wanted.reshape(-1).astype(jnp.int32)).reshape(wanted.shape)
    fits = running[:, -1] <= table.num_free
    taken = wanted & fits[:, None]
    # Only the top of the stack is read, and XLA can see that: a gather from all of it would be
    # priced, and split over threads, by the pool's size.
    window = min(wanted.size, num_pages)
    bottom = jnp.maximum(table.num_free - window, 0)
    top = lax.dynamic_slice(table.free_pages, (bottom,), (window,))
    place = jnp.where(taken, table.num_free - bottom - running, window)
    popped = top.at[place].get(mode="fill", fill_value=num_pages)
    copied = taken & (pages < num_pages)
    width = table.max_pages_per_seq
    entries = jnp.where(taken, rows[:, None] * width + cols, INT32_MAX).reshape(-1)
    block_tables = table.block_tables.reshape(-1).at[entries].set(popped.reshape(-1), mode="drop")
    ref_counts, free_pages, num_free, source, target, count = copy_on_write(
        table.ref_counts.at[popped].set(1, mode="drop"),
        table.free_pages,
        table.num_free - jnp.max(jnp.where(fits, running[:, -1], 0)),
        pages.ravel(),
        popped.ravel(),
        copied.ravel(),
    )
    table = replace(
        table,
        block_tables=block_tables.reshape(table.block_tables.shape),
        ref_counts=ref_counts,
        free_pages=free_pages,
        num_free=num_free,
    )
    ok = possible & (fits | ~jnp.any(wanted, axis=1))
    return table, ok, PageCopies(src=source, dst=target, count=count)


def copy_on_write(
    ref_counts: Array, free_pages: Array, num_free: Array, old: Array, own: Array, mask: Array
) -> tuple[Array, ...]:
    """Gives up the masked `old` pages for `own` ones, and lists the copies to make."""
    num_pages = ref_counts.size

    def copy(ref_counts: Array, free_pages: Array, num_free: Array, *_: Array) -> tuple[Array, ...]:
        order = running_sum(mask.astype(jnp.int32))
        to = jnp.where(mask, order - 1, mask.size)
        none = jnp.full_like(old, num_pages)
        source, target = none.at[to].set(old, mode="drop"), none.at[to].set(own, mode="drop")
        state = give_up(ref_counts, free_pages, num_free, old, mask)
        return *state, source, target, order[-1]

    none = jnp.full_like(old, num_pages)
    state = (ref_counts, free_pages, num_free, none, none, jnp.zeros_like(num_free))
    return when(jnp.any(mask), copy, *state)


def append(table: PageTable, n: ArrayLike) -> tuple[PageTable, Array]:
    """Advances `kv_lens` over room that the rows hold.

    Speculation reserves k tokens and appends those that were accepted.

    Args:
      table: the table.
      n: i32[R], tokens to add to each row.

    Returns:
      The table and `ok` bool[R]: not ok, and unchanged, where `n` is negative, where it goes
      beyond the pages the row holds, or where the next token would fall in a page that others
      hold (the row did not reserve it).
    """
    n = as_integers("n", n, (table.max_seqs,))
    rows = jnp.arange(table.max_seqs, dtype=jnp.int32)
    room = table.max_pages_per_seq * table.page_size - table.kv_lens
    grows = (n > 0) & (n <= room)
    lens = table.kv_lens + jnp.where(grows, n, 0)
    last = pages_for(lens, table.page_size) - 1
    # A row's pages are contiguous, so holding the last one is holding all that it can write to.
    last_page = read_entries(table, rows, jnp.where(grows, last, table.max_pages_per_seq))
    next_page = read_entries(table, rows, table.kv_lens // table.page_size)
    holders = table.ref_counts.at[next_page].get(mode="fill", fill_value=0)
    grows &= (last_page < table.num_pages) & (holders <= 1)
    return replace(table, kv_lens=jnp.where(grows, lens, table.kv_lens)), grows | (n == 0)


def truncate(table: PageTable, new_lens: ArrayLike) -> tuple[PageTable, Array]:
    """Forgets tokens: row r keeps its first `new_lens[r]`.

    Every page past the `ceil(new_len / page_size)` that hold them is given back, spare reserved
    ones included. To leave a row alone, spare pages and all, pass a length that is not ok, such
    as -1.

    Args:
      table: the table.
      new_lens: i32[R], tokens to keep.

    Returns:
      The table and `ok` bool[R]: not ok, and unchanged, where `new_lens` is negative or above
      `kv_lens`, or where the last token to keep was discarded.
    """
    lens = as_integers("new_lens", new_lens, (table.max_seqs,))
    ok = (lens >= 0) & (lens <= table.kv_lens)
    rows = jnp.arange(table.max_seqs, dtype=jnp.int32)
    last = jnp.where(ok, pages_for(lens, table.page_size) - 1, 0)
    ok &= (lens == 0) | (read_entries(table, rows, jnp.maximum(last, 0)) < table.num_pages)
    lens = jnp.where(ok, lens, table.kv_lens)
    keep = jnp.where(ok, pages_for(lens, table.page_size), table.max_pages_per_seq)
    return trim(table, keep, lens), ok


def release(table: PageTable, mask: ArrayLike) -> PageTable:
    """Empties the rows in `mask` bool[R]; pages that nobody holds any more become free.

    Rows that are empty already are left as they are.
    """
    mask = as_mask("mask", mask, (table.max_seqs,))
    keep = jnp.where(mask, 0, table.max_pages_per_seq)
    return trim(table, keep, jnp.where(mask, 0, table.kv_lens))


def trim(table: PageTable, keep: Array, kv_lens: Array) -> PageTable:
    """Gives up row r's pages past the first `keep[r]`, and sets the lengths."""
    entries = jnp.arange(table.max_pages_per_seq, dtype=jnp.int32)
    rows = jnp.arange(table.max_seqs, dtype=jnp.int32)
    # Pages are contiguous, and the one with the last token is held: whether a row has any past
    # `keep` shows in one entry.
    last = jnp.maximum(pages_for(table.kv_lens, table.page_size) - 1, 0)
    some = jnp.any(read_entries(table, rows, jnp.maximum(keep, last)) < table.num_pages)
    return without(replace(table, kv_lens=kv_lens), entries >= keep[:, None], some)


def discard(table: PageTable, starts: ArrayLike) -> PageTable:
    """Gives back the pages whose tokens all come before `starts[r]`: nobody will look at them.

    For models in which every layer has a sliding window. The row's length and the places of its
    other tokens stay; the entries of the pages given back are the sentinel from now on, also in
    forks of the row. The page with the last token is kept in any case. Whoever truncates the row
    afterwards must know that its window may reach what is no longer there.

    Args:
      table: the table.
      starts: i32[R], the first token that is still needed; not positive: leaves the row as it is.

    Returns:
      The table.
    """
    starts = as_integers("starts", starts, (table.max_seqs,))
    entries = jnp.arange(table.max_pages_per_seq, dtype=jnp.int32)
    rows = jnp.arange(table.max_seqs, dtype=jnp.int32)
    behind = jnp.minimum(starts, table.kv_lens - 1) // table.page_size
    # Pages are given back in order: whether there are any left shows in the last of them.
    last = jnp.where(behind > 0, behind - 1, table.max_pages_per_seq)
    some = jnp.any(read_entries(table, rows, last) < table.num_pages)
    return without(table, entries < behind[:, None], some)


def without(table: PageTable, mask: Array, some: Array) -> PageTable:
    """Gives up the block table's entries in a mask bool[R, M], if `some` bool[] of them are pages.

    Where `some` is false, none may be.
    """

    def give_back(
        block_tables: Array, kv_lens: Array, ref_counts: Array, free_pages: Array, num_free: Array
    ) -> tuple[Array, ...]:
        pools = give_up(
            ref_counts, free_pages, num_free, block_tables.reshape(-1), mask.reshape(-1)
        )
        gone = mask & (pools[2] >= 0)  # always: but now the write comes after the reads
        return jnp.where(gone, table.num_pages, block_tables), kv_lens, *pools

    some = after_reads(table, some)
    return with_leaves(table, when(some, give_back, *leaves(table)))
