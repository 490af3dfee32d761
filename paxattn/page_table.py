"""Who owns which page: the page table and its steps, pure functions that run inside `jax.jit`.

A row of the table is a sequence (`R` = `max_seqs` rows). Its tokens lie in pages of `page_size`
(`P`) tokens; `block_tables[r]` lists row r's pages in order, contiguous from entry 0, and every
entry past them is the sentinel `num_pages` (`N`): never -1, which JAX would wrap round to the last
page. A row may hold more pages than its `kv_lens[r]` tokens fill (reserved, not yet appended).

Pages are shared by counting holders in `ref_counts`, and the free ones wait on a stack, of which
the first `num_free` entries of `free_pages` are valid. A page is on the stack or held, never both
and never neither.

Every step takes a table and returns the next one. Nothing raises for what the data asks: what
cannot be done is reported per row (`ok`), and that row is left exactly as it was. Only mistakes
visible while tracing (shapes, dtypes, static sizes) raise. The steps donate nothing; jit them with
`donate_argnums=0` and XLA updates the table in place.

Costs: `reserve` and `append` are O(rows); `fork`, `reorder`, `truncate` and `release` are
O(rows x max_pages_per_seq), and next to nothing when there is nothing to do. No step costs in
proportion to the pool. Under `vmap` results are the same, but branches that skip work become
selects, so these costs are promised only without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

_INT32_MAX = 2**31 - 1
_SLOT_HEADROOM = 2**20  # slots past the pool: inactive tokens get distinct out-of-range ones


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PageTable:
    """The allocator's whole state, a pytree of int32 arrays.

    Attributes:
      block_tables: i32[max_seqs, max_pages_per_seq], pages of each row; unused = `num_pages`.
      kv_lens: i32[max_seqs], tokens whose keys and values are valid, per row.
      ref_counts: i32[num_pages], holders of each page (rows, plus whoever called `retain`).
      free_pages: i32[num_pages], stack of free page ids; the first `num_free` are valid.
      num_free: i32[], pages on the stack.
      page_size: tokens per page (static).
    """

    block_tables: Array
    kv_lens: Array
    ref_counts: Array
    free_pages: Array
    num_free: Array
    page_size: int = field(metadata={"static": True})

    @property
    def num_pages(self) -> int:
        """Pages in the pool; also the sentinel that means "no page"."""
        return self.ref_counts.shape[-1]

    @property
    def max_seqs(self) -> int:
        """Rows."""
        return self.block_tables.shape[-2]

    @property
    def max_pages_per_seq(self) -> int:
        """Entries in a row, so a row holds at most `max_pages_per_seq * page_size` tokens."""
        return self.block_tables.shape[-1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PageCopies:
    """Page copies that `reserve` ordered; `kv_cache.copy_pages` runs them.

    They must be run on every cache that uses the table before any write, read or further table
    step: a source may already be back on the free stack.

    Attributes:
      src: i32[K], pages to copy from; entries past `count` are `num_pages`.
      dst: i32[K], pages to copy to, all distinct; entries past `count` are `num_pages`.
      count: i32[], valid entries.
    """

    src: Array
    dst: Array
    count: Array


def init_page_table(
    *, num_pages: int, page_size: int, max_seqs: int, max_pages_per_seq: int
) -> PageTable:
    """Makes an empty table: every page free, every row empty.

    Pages of a fresh table are handed out in ascending order.

    Args:
      num_pages: pages in the pool.
      page_size: tokens per page, 1 to 256.
      max_seqs: rows, i.e. sequences alive at once.
      max_pages_per_seq: most pages a row can hold.

    Returns:
      The table; `4 * (max_seqs * (max_pages_per_seq + 1) + 2 * num_pages + 1)` bytes.

    Raises:
      ValueError: a size is not a positive integer, `page_size` is above 256, or the slots of the
        pool or the tokens of a row would overflow int32.
    """
    num_pages = _positive("num_pages", num_pages)
    page_size = _positive("page_size", page_size)
    max_seqs = _positive("max_seqs", max_seqs)
    max_pages_per_seq = _positive("max_pages_per_seq", max_pages_per_seq)
    if page_size > 256:
        raise ValueError(f"{page_size=} must be between 1 and 256")
    limit = _INT32_MAX - _SLOT_HEADROOM
    if num_pages * page_size > limit:
        raise ValueError(
            f"{num_pages=} times {page_size=} is {num_pages * page_size} slots, but slots are"
            f" int32: at most {limit}; use at most {limit // page_size} pages"
        )
    if max_pages_per_seq * page_size > limit:
        raise ValueError(
            f"{max_pages_per_seq=} times {page_size=} is {max_pages_per_seq * page_size} tokens a"
            f" row, but lengths are int32: at most {limit}; lower max_pages_per_seq"
        )
    return PageTable(
        block_tables=jnp.full((max_seqs, max_pages_per_seq), num_pages, jnp.int32),
        kv_lens=jnp.zeros((max_seqs,), jnp.int32),
        ref_counts=jnp.zeros((num_pages,), jnp.int32),
        free_pages=jnp.arange(num_pages, dtype=jnp.int32)[::-1],
        num_free=jnp.asarray(num_pages, jnp.int32),
        page_size=page_size,
    )


def reserve(
    table: PageTable, new_tokens: ArrayLike, *, max_new_pages: int = 1
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
    than `max_new_pages` missing ones.

    Only pages that a row can come to write are looked at: the one holding its next token, and the
    last `max_new_pages` that it needs. Those between are spare pages that it reserved itself, and
    nobody else should hold (see `retain`); `slot_mapping` leaves them out if somebody does.

    Args:
      table: the table.
      new_tokens: i32[R], tokens each row is about to write; 0 leaves a row as it is.
      max_new_pages: static bound on the pages a row may lack; copies do not count.

    Returns:
      The table, `ok` bool[R], and the copies to run, of length `R * (max_new_pages + 1)`.

    Raises:
      ValueError: `new_tokens` is not one integer per row, or `max_new_pages` is below 1.
    """
    new = _integers("new_tokens", new_tokens, (table.max_seqs,))
    max_new_pages = _positive("max_new_pages", max_new_pages)
    num_pages, page_size = table.num_pages, table.page_size
    span = min(max_new_pages, table.max_pages_per_seq)
    rows = jnp.arange(table.max_seqs, dtype=jnp.int32)

    # Compared against the room that is left, because kv_lens + new_tokens could overflow.
    possible = (new >= 0) & (new <= table.max_pages_per_seq * page_size - table.kv_lens)
    new = jnp.where(possible, new, 0)
    needed = jnp.where(new > 0, _pages_for(table.kv_lens + new, page_size), 0)
    first = table.kv_lens // page_size
    # Of the pages past `base` at most `span` are needed. If base is past `first`, then `base`
    # itself must be held already, and with it all that come before.
    base = jnp.maximum(first, needed - 1 - span)
    step = jnp.arange(span + 1, dtype=jnp.int32)
    cols = jnp.where(step > 0, base[:, None] + step, first[:, None])
    pages = _entries(table, rows[:, None], cols)
    base_page = _entries(table, rows, base)
    holders = table.ref_counts.at[pages].get(mode="fill", fill_value=0)
    possible &= (needed - base <= span) | (base_page < num_pages)
    # Missing, or shared and about to be written.
    wanted = (cols < needed[:, None]) & possible[:, None] & ((pages == num_pages) | (holders > 1))

    running = _running_sum(wanted.reshape(-1).astype(jnp.int32)).reshape(wanted.shape)

    def take(
        block_tables: Array, ref_counts: Array, free_pages: Array, num_free: Array
    ) -> tuple[Array, ...]:
        fits = running[:, -1] <= num_free
        taken = wanted & fits[:, None]
        # Only the top of the stack is read, and XLA can see that: a gather from all of it would be
        # priced, and split over threads, by the pool's size.
        window = min(wanted.size, num_pages)
        bottom = jnp.maximum(num_free - window, 0)
        top = lax.dynamic_slice(free_pages, (bottom,), (window,))
        place = jnp.where(taken, num_free - bottom - running, window)
        popped = top.at[place].get(mode="fill", fill_value=num_pages)
        copied = taken & (pages < num_pages)
        width = table.max_pages_per_seq
        entries = jnp.where(taken, rows[:, None] * width + cols, _INT32_MAX).reshape(-1)
        block_tables = block_tables.reshape(-1).at[entries].set(popped.reshape(-1), mode="drop")
        ref_counts = ref_counts.at[popped].set(1, mode="drop")
        num_free -= jnp.max(jnp.where(fits, running[:, -1], 0))
        return (
            block_tables.reshape(table.block_tables.shape),
            *_copy_on_write(
                ref_counts, free_pages, num_free, pages.ravel(), popped.ravel(), copied.ravel()
            ),
            fits | ~jnp.any(wanted, axis=1),
        )

    def nothing(
        block_tables: Array, ref_counts: Array, free_pages: Array, num_free: Array
    ) -> tuple[Array, ...]:
        none = jnp.full_like(pages.ravel(), num_pages)
        count = jnp.zeros_like(num_free)
        fits = jnp.ones_like(possible)
        return block_tables, ref_counts, free_pages, num_free, none, none, count, fits

    state = (table.block_tables, table.ref_counts, table.free_pages, table.num_free)
    block_tables, ref_counts, free_pages, num_free, source, target, count, fits = lax.cond(
        running[-1, -1] > 0, take, nothing, *state
    )
    table = replace(
        table,
        block_tables=block_tables,
        ref_counts=ref_counts,
        free_pages=free_pages,
        num_free=num_free,
    )
    return table, possible & fits, PageCopies(src=source, dst=target, count=count)


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
    n = _integers("n", n, (table.max_seqs,))
    rows = jnp.arange(table.max_seqs, dtype=jnp.int32)
    room = table.max_pages_per_seq * table.page_size - table.kv_lens
    grows = (n > 0) & (n <= room)
    lens = table.kv_lens + jnp.where(grows, n, 0)
    last = _pages_for(lens, table.page_size) - 1
    # A row's pages are contiguous, so holding the last one is holding them all.
    last_page = _entries(table, rows, jnp.where(grows, last, table.max_pages_per_seq))
    next_page = _entries(table, rows, table.kv_lens // table.page_size)
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
      `kv_lens`.
    """
    lens = _integers("new_lens", new_lens, (table.max_seqs,))
    ok = (lens >= 0) & (lens <= table.kv_lens)
    lens = jnp.where(ok, lens, table.kv_lens)
    keep = jnp.where(ok, _pages_for(lens, table.page_size), table.max_pages_per_seq)
    return _trim(table, keep, lens), ok


def release(table: PageTable, mask: ArrayLike) -> PageTable:
    """Empties the rows in `mask` bool[R]; pages that nobody holds any more become free.

    Rows that are empty already are left as they are.
    """
    mask = _mask("mask", mask, (table.max_seqs,))
    keep = jnp.where(mask, 0, table.max_pages_per_seq)
    return _trim(table, keep, jnp.where(mask, 0, table.kv_lens))


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
    src = _integers("src", src, None)
    dst = _integers("dst", dst, src.shape)
    max_seqs, num_pages = table.max_seqs, table.num_pages
    ok = (src >= 0) & (src < max_seqs) & (dst >= 0) & (dst < max_seqs) & (src != dst)
    # Out-of-range indices are masked before they are used: a negative one would wrap round.
    first_page = table.block_tables.at[jnp.where(ok, dst, max_seqs), 0].get(
        mode="fill", fill_value=num_pages
    )
    ok &= first_page == num_pages
    turn = jnp.arange(src.size, dtype=jnp.int32)
    to = jnp.where(ok, dst, max_seqs)
    winner = jnp.full((max_seqs,), src.size, jnp.int32).at[to].min(turn, mode="drop")
    ok &= winner.at[to].get(mode="fill", fill_value=-1) == turn

    source = jnp.where(ok, src, max_seqs)
    lens = table.kv_lens.at[source].get(mode="fill", fill_value=0)
    to = jnp.where(lens > 0, to, max_seqs)

    def share(block_tables: Array, kv_lens: Array, ref_counts: Array) -> tuple[Array, ...]:
        pages = _pages_of(block_tables, source, _pages_for(lens, table.page_size), table.num_pages)
        return (
            block_tables.at[to].set(pages, mode="drop"),
            kv_lens.at[to].set(lens, mode="drop"),
            ref_counts.at[pages].add(1, mode="drop"),
        )

    block_tables, kv_lens, ref_counts = lax.cond(
        jnp.any(lens > 0),
        share,
        lambda *state: state,
        table.block_tables,
        table.kv_lens,
        table.ref_counts,
    )
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
    parents = _integers("parents", parents, (table.max_seqs,))
    moves = _mask("mask", mask, (table.max_seqs,)) & (parents >= 0) & (parents < table.max_seqs)
    parents = jnp.where(moves, parents, table.max_seqs)

    def move(
        block_tables: Array, kv_lens: Array, ref_counts: Array, free_pages: Array, num_free: Array
    ) -> tuple[Array, ...]:
        lens = kv_lens.at[parents].get(mode="fill", fill_value=0)
        counts = _pages_for(lens, table.page_size)
        pages = _pages_of(block_tables, parents, counts, table.num_pages)
        # New holds first: a page that a row passes on must not become free in between.
        ref_counts = ref_counts.at[pages].add(1, mode="drop")
        old = jnp.broadcast_to(moves[:, None], pages.shape).reshape(-1)
        pools = _give_up(ref_counts, free_pages, num_free, block_tables.reshape(-1), old)
        moved = moves & (pools[2] >= 0)  # always: but now the write comes after the reads
        return (
            jnp.where(moved[:, None], pages, block_tables),
            jnp.where(moved, lens, kv_lens),
            *pools,
        )

    return _with_state(table, lax.cond(jnp.any(moves), move, lambda *s: s, *_state(table)))


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
    row = _integers("row", row, ())
    num_tokens = _integers("num_tokens", num_tokens, ())
    pages = _integers("pages", pages, None)
    size, num_pages = pages.size, table.num_pages
    if size > table.max_pages_per_seq:
        raise ValueError(
            f"pages has {size} entries, but a row has {table.max_pages_per_seq=}: pass fewer"
        )
    ok = _after_reads(table, (row >= 0) & (row < table.max_seqs))
    ok &= (num_tokens >= 0) & (num_tokens <= size * table.page_size)
    num_tokens = jnp.where(ok, num_tokens, 0)
    used = jnp.arange(size, dtype=jnp.int32) < _pages_for(num_tokens, table.page_size)
    pages = jnp.where(used & (pages >= 0) & (pages < num_pages), pages, num_pages)
    holders = table.ref_counts.at[pages].get(mode="fill", fill_value=0)
    ok &= jnp.all((holders > 0) | ~used)
    row = jnp.where(ok, row, table.max_seqs)
    ok &= table.block_tables.at[row, 0].get(mode="fill", fill_value=0) == num_pages
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
    block_tables, kv_lens, ref_counts = lax.cond(ok, start, lambda *s: s, *state)
    table = replace(table, block_tables=block_tables, kv_lens=kv_lens, ref_counts=ref_counts)
    return table, ok


def retain(table: PageTable, pages: ArrayLike, mask: ArrayLike) -> PageTable:
    """Adds a holder that is no row (the prefix cache) to each masked page of `pages` i32[K].

    A page mentioned twice is held twice. Pages that are free or out of range are ignored: a free
    page has nothing worth holding. Retain pages whose tokens have been appended, not spare ones:
    a row does not expect to share a page that it reserved and has not begun to write.
    """
    pages = _integers("pages", pages, None)
    mask = _mask("mask", mask, pages.shape)
    held = _in_use(table.ref_counts, pages, _after_reads(table, mask))
    pages = jnp.where(held, pages, table.num_pages)
    return replace(table, ref_counts=table.ref_counts.at[pages].add(1, mode="drop"))


def drop(table: PageTable, pages: ArrayLike, mask: ArrayLike) -> PageTable:
    """Gives up the holds that `retain` took on the masked pages of `pages` i32[K].

    A page mentioned twice loses two holds. Pages that nobody holds any more become free; those
    that are free already or out of range are ignored.
    """
    pages = _integers("pages", pages, None)
    mask = _mask("mask", mask, pages.shape)
    ref_counts, free_pages, num_free = _give_up(
        table.ref_counts, table.free_pages, table.num_free, pages, _after_reads(table, mask)
    )
    return replace(table, ref_counts=ref_counts, free_pages=free_pages, num_free=num_free)


def token_rows(q_lens: ArrayLike, num_tokens: int) -> tuple[Array, Array, Array]:
    """Says which row each token of a packed ragged step belongs to.

    Row r's `q_lens[r]` tokens come after those of the rows before it; what is left of the
    `num_tokens` is padding. Tokens past `num_tokens` are cut off, negative `q_lens` count as 0.

    Args:
      q_lens: i32[R], tokens of each row in this step.
      num_tokens: static length T of the packed step.

    Returns:
      rows i32[T] (R for padding, which is out of range), offsets i32[T] of each token among its
      row's (0 for padding), and active bool[T].
    """
    q_lens = _integers("q_lens", q_lens, None)
    lens = jnp.clip(q_lens, 0, num_tokens)  # also keeps the sum from overflowing
    ends = jnp.cumsum(lens, dtype=jnp.int32)
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    # Unrolled: log2(R) gathers in one fused kernel, where the default is a loop of kernels.
    rows = jnp.searchsorted(ends, tokens, side="right", method="scan_unrolled").astype(jnp.int32)
    active = rows < q_lens.size
    starts = (ends - lens).at[rows].get(mode="fill", fill_value=0)
    return rows, jnp.where(active, tokens - starts, 0), active


def slot_mapping(table: PageTable, q_lens: ArrayLike, num_tokens: int) -> Array:
    """Says where the tokens about to be written go: call it after `reserve`, before `append`.

    Row r writes `q_lens[r]` tokens at positions `kv_lens[r]` and on, packed as in `token_rows`.
    The token at position p of row r goes to slot
    `block_tables[r, p // page_size] * page_size + p % page_size`.

    Args:
      table: the table.
      q_lens: i32[R], tokens of each row in this step.
      num_tokens: static length T of the packed step.

    Returns:
      i32[T] slots, all distinct. Padding, and tokens that must not be written (beyond the pages
      their row holds, or in a page that others hold too), get out-of-range slots
      `num_pages * page_size + t`, which writes drop.

    Raises:
      ValueError: `q_lens` is not one integer per row, or the out-of-range slots would overflow
        int32.
    """
    q_lens = _integers("q_lens", q_lens, (table.max_seqs,))
    num_pages, page_size = table.num_pages, table.page_size
    if num_pages * page_size + num_tokens > _INT32_MAX:
        raise ValueError(
            f"{num_tokens=} with {num_pages=} and {page_size=} overflows int32 slots: write in"
            f" steps of at most {_INT32_MAX - num_pages * page_size} tokens"
        )
    rows, offsets, active = token_rows(q_lens, num_tokens)
    positions = table.kv_lens.at[rows].get(mode="fill", fill_value=0) + offsets
    pages = table.block_tables.at[rows, positions // page_size].get(
        mode="fill", fill_value=num_pages
    )
    active &= table.ref_counts.at[pages].get(mode="fill", fill_value=0) == 1
    outside = num_pages * page_size + jnp.arange(num_tokens, dtype=jnp.int32)
    return jnp.where(active, pages * page_size + positions % page_size, outside)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Utilization:
    """How well the pool is used: exact counts, i32[] each.

    Attributes:
      num_pages: pages in the pool.
      pages_held: pages off the free stack, whoever holds them.
      pages_in_rows: distinct pages that rows hold.
      tokens_stored: tokens of all rows, `sum(kv_lens)`; shared ones count in every row.
      tokens_shared: how many of those need no slot of their own because rows share pages.
      slots_in_rows: `pages_in_rows * page_size`.
    """

    num_pages: Array
    pages_held: Array
    pages_in_rows: Array
    tokens_stored: Array
    tokens_shared: Array
    slots_in_rows: Array

    @property
    def fraction(self) -> Array:
        """Part of the rows' slots that holds a token, f32[]; 1 when the rows hold no page."""
        filled = (self.tokens_stored - self.tokens_shared).astype(jnp.float32)
        slots = self.slots_in_rows.astype(jnp.float32)
        return jnp.where(slots > 0, filled / jnp.maximum(slots, 1), 1)


def utilization(table: PageTable) -> Utilization:
    """Counts pages and tokens, O(num_pages + rows x max_pages_per_seq): for diagnostics.

    A page that rows share is as full as the row that has most tokens in it.
    """
    page_size = table.page_size
    starts = jnp.arange(table.max_pages_per_seq, dtype=jnp.int32) * page_size
    fill = jnp.clip(table.kv_lens[:, None] - starts, 0, page_size)
    # One more than the fill, so that a page held empty differs from one not held by any row.
    filled = jnp.zeros_like(table.ref_counts).at[table.block_tables].max(fill + 1, mode="drop")
    in_rows = jnp.sum(filled > 0, dtype=jnp.int32)
    stored = jnp.sum(table.kv_lens, dtype=jnp.int32)
    return Utilization(
        num_pages=jnp.asarray(table.num_pages, jnp.int32),
        pages_held=table.num_pages - table.num_free,
        pages_in_rows=in_rows,
        tokens_stored=stored,
        tokens_shared=stored - (jnp.sum(filled, dtype=jnp.int32) - in_rows),
        slots_in_rows=in_rows * page_size,
    )


class InvariantError(ValueError):
    """A page table contradicts itself."""


def check_invariants(table: PageTable, held_elsewhere: ArrayLike | None = None) -> None:
    """Checks on the host that a table is consistent.

    Args:
      table: a table with concrete arrays (not inside jit), without leading axes.
      held_elsewhere: i32[num_pages], holds on each page by holders that are no rows (the prefix
        cache); None means none.

    Raises:
      InvariantError: naming what is wrong, with counts.
    """
    blocks, lens, refs, stack, num_free = (np.asarray(x) for x in jax.device_get(_state(table)))
    num_pages, page_size = table.num_pages, table.page_size
    elsewhere = np.zeros(num_pages, np.int64)
    if held_elsewhere is not None:
        elsewhere = np.asarray(held_elsewhere, np.int64)

    def need(good: np.ndarray | bool, what: str) -> None:
        if not np.all(good):
            where = np.argwhere(~np.atleast_1d(good))
            raise InvariantError(f"{what}: {len(where)} wrong, first at {where[0].tolist()}")

    for name, x, shape in (
        ("block_tables", blocks, blocks.shape[-2:]),
        ("kv_lens", lens, blocks.shape[-2:-1]),
        ("ref_counts", refs, (num_pages,)),
        ("free_pages", stack, (num_pages,)),
        ("num_free", num_free, ()),
        ("held_elsewhere", elsewhere, (num_pages,)),
    ):
        if x.shape != shape:
            raise InvariantError(f"{name} has shape {x.shape}, expected {shape}")
    need((blocks >= 0) & (blocks <= num_pages), f"block_tables entries outside 0..{num_pages}")
    held = blocks < num_pages
    need(held[:, :-1] | ~held[:, 1:], "pages after an unused entry of block_tables")
    need(lens >= 0, "negative kv_lens")
    need(-(-lens // page_size) <= held.sum(axis=1), "kv_lens beyond the pages held")
    holders = np.bincount(blocks[held], minlength=num_pages) + elsewhere
    wrong = np.flatnonzero(refs != holders)
    if wrong.size:
        page = wrong[0]
        raise InvariantError(
            f"ref_counts differ from the holders of {wrong.size} pages, first page {page}:"
            f" counted {refs[page]}, held {holders[page]} times"
        )
    if not 0 <= num_free <= num_pages:
        raise InvariantError(f"num_free={num_free} is outside 0..{num_pages}")
    free = stack[:num_free]
    need((free >= 0) & (free < num_pages), f"free_pages entries outside 0..{num_pages - 1}")
    times = np.bincount(free, minlength=num_pages)
    need(times <= 1, "pages on the free stack more than once")
    need((times == 0) | (refs == 0), "pages both free and held")
    need((times == 1) | (refs > 0), "pages neither free nor held")


def _give_up(
    ref_counts: Array, free_pages: Array, num_free: Array, pages: Array, mask: Array
) -> tuple[Array, Array, Array]:
    """Takes one hold from each masked page of `pages` i32[K], and frees those left by everybody.

    Every step that gives up holds does it here. Each mention counts as a hold of its own; pages
    out of range or free already are ignored, and no count goes below zero. O(K), with no scratch
    of the pool's size: the mentions of an emptied page settle which of them pushes it by a
    scatter-max into the page's own count, which is 0 afterwards anyway.

    The branches skip work, but they also order reads of `ref_counts` before the writes that
    follow: what enters a branch is computed once, before it. Otherwise XLA may fuse a read into
    several later users, find the old array still alive at the write, and copy the pool.
    """
    num_pages = ref_counts.size
    if pages.size == 0:
        return ref_counts, free_pages, num_free
    held = jnp.where(_in_use(ref_counts, pages, mask), pages, num_pages)

    def lose(ref_counts: Array, free_pages: Array, num_free: Array) -> tuple[Array, ...]:
        ref_counts = ref_counts.at[held].add(-1, mode="drop")
        empty = ref_counts.at[held].get(mode="fill", fill_value=1) <= 0
        emptied = jnp.where(empty, held, num_pages)

        def push(ref_counts: Array, free_pages: Array, num_free: Array) -> tuple[Array, ...]:
            claims = jnp.arange(1, held.size + 1, dtype=jnp.int32)
            ref_counts = ref_counts.at[emptied].max(claims, mode="drop")
            won = ref_counts.at[emptied].get(mode="fill", fill_value=0) == claims
            order = _running_sum(won.astype(jnp.int32))
            won = jnp.diff(order, prepend=0) > 0  # again from `order`: see above
            page = jnp.where(won, emptied, num_pages)
            top = jnp.where(won, num_free + order - 1, num_pages)
            return (
                ref_counts.at[page].set(0, mode="drop"),
                free_pages.at[top].set(page, mode="drop"),
                num_free + order[-1],
            )

        state = (ref_counts, free_pages, num_free)
        return lax.cond(jnp.any(emptied < num_pages), push, lambda *s: s, *state)

    state = (ref_counts, free_pages, num_free)
    return lax.cond(jnp.any(held < num_pages), lose, lambda *s: s, *state)


def _copy_on_write(
    ref_counts: Array, free_pages: Array, num_free: Array, old: Array, own: Array, mask: Array
) -> tuple[Array, ...]:
    """Gives up the masked `old` pages for `own` ones, and lists the copies to make."""
    num_pages = ref_counts.size

    def copy(ref_counts: Array, free_pages: Array, num_free: Array) -> tuple[Array, ...]:
        order = _running_sum(mask.astype(jnp.int32))
        to = jnp.where(mask, order - 1, mask.size)
        none = jnp.full_like(old, num_pages)
        source, target = none.at[to].set(old, mode="drop"), none.at[to].set(own, mode="drop")
        state = _give_up(ref_counts, free_pages, num_free, old, mask)
        return *state, source, target, order[-1]

    def no_copy(ref_counts: Array, free_pages: Array, num_free: Array) -> tuple[Array, ...]:
        none = jnp.full_like(old, num_pages)
        return ref_counts, free_pages, num_free, none, none, jnp.zeros_like(num_free)

    return lax.cond(jnp.any(mask), copy, no_copy, ref_counts, free_pages, num_free)


def _trim(table: PageTable, keep: Array, kv_lens: Array) -> PageTable:
    """Gives up row r's pages past the first `keep[r]`, and sets the lengths."""
    entries = jnp.arange(table.max_pages_per_seq, dtype=jnp.int32)
    rows = jnp.arange(table.max_seqs, dtype=jnp.int32)
    # Pages are contiguous: whether a row has any past `keep` shows in one entry.
    next_page = _entries(table, rows, keep)

    def give_back(
        block_tables: Array, kv_lens: Array, ref_counts: Array, free_pages: Array, num_free: Array
    ) -> tuple[Array, ...]:
        past = entries >= keep[:, None]
        pools = _give_up(
            ref_counts, free_pages, num_free, block_tables.reshape(-1), past.reshape(-1)
        )
        past &= pools[2] >= 0  # always: but now the write comes after the reads
        return jnp.where(past, table.num_pages, block_tables), kv_lens, *pools

    table = replace(table, kv_lens=kv_lens)
    some = _after_reads(table, jnp.any(next_page < table.num_pages))
    return _with_state(table, lax.cond(some, give_back, lambda *s: s, *_state(table)))


def _after_reads(table: PageTable, mask: Array) -> Array:
    """The mask unchanged, but XLA cannot know: lengths are never negative.

    What made the lengths (`append`) read the table. A step whose writes depended on nothing of it
    could come before those reads, and XLA would copy the pool to allow that.
    """
    return mask & jnp.all(table.kv_lens >= 0)


def _pages_of(block_tables: Array, rows: Array, counts: Array, num_pages: int) -> Array:
    """The first `counts[i]` pages of row `rows[i]`, padded by the sentinel."""
    entries = jnp.arange(block_tables.shape[1], dtype=jnp.int32)
    pages = block_tables.at[rows].get(mode="fill", fill_value=num_pages)
    return jnp.where(entries < counts[:, None], pages, num_pages)


def _entries(table: PageTable, rows: Array, cols: Array) -> Array:
    """Block table entries; the sentinel where a row or column is past the end (never negative)."""
    # One flat index is much cheaper than index pairs, which XLA's CPU back end builds first.
    width = table.max_pages_per_seq
    flat = jnp.where((rows < table.max_seqs) & (cols < width), rows * width + cols, _INT32_MAX)
    return table.block_tables.reshape(-1).at[flat].get(mode="fill", fill_value=table.num_pages)


def _running_sum(x: Array) -> Array:
    """Inclusive cumulative sum of i32[K], exact.

    `jnp.cumsum` becomes a dozen kernels on a CPU, several microseconds; sums over blocks fuse.
    """
    width = 16
    if x.size <= width:
        return jnp.sum(jnp.where(jnp.tri(x.size, dtype=bool), x, 0), axis=1, dtype=jnp.int32)
    blocks = jnp.pad(x, (0, -x.size % width)).reshape(-1, width)
    inner = jnp.where(jnp.tri(width, dtype=bool), blocks[:, None, :], 0)
    inner = jnp.sum(inner, axis=-1, dtype=jnp.int32)
    ends = _running_sum(inner[:, -1])
    return (inner + (ends - inner[:, -1])[:, None]).reshape(-1)[: x.size]


def _in_use(ref_counts: Array, pages: Array, mask: Array) -> Array:
    """Which masked pages are in range and held by somebody."""
    inside = mask & (pages >= 0) & (pages < ref_counts.size)
    pages = jnp.where(inside, pages, ref_counts.size)
    return ref_counts.at[pages].get(mode="fill", fill_value=0) > 0


def _pages_for(tokens: Array, page_size: int) -> Array:
    return (tokens + (page_size - 1)) // page_size


def _state(table: PageTable) -> tuple[Array, ...]:
    return (
        table.block_tables,
        table.kv_lens,
        table.ref_counts,
        table.free_pages,
        table.num_free,
    )


def _with_state(table: PageTable, state: tuple[Array, ...]) -> PageTable:
    block_tables, kv_lens, ref_counts, free_pages, num_free = state
    return PageTable(
        block_tables=block_tables,
        kv_lens=kv_lens,
        ref_counts=ref_counts,
        free_pages=free_pages,
        num_free=num_free,
        page_size=table.page_size,
    )


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    return int(value)


def _integers(name: str, value: ArrayLike, shape: tuple[int, ...] | None) -> Array:
    """Converts to int32 and checks the shape; None: any one axis."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    if array.ndim != 1 if shape is None else array.shape != shape:
        wanted = "one axis" if shape is None else f"shape {shape}"
        raise ValueError(f"{name} has shape {array.shape}, expected {wanted}")
    return array.astype(jnp.int32)


def _mask(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = jnp.asarray(value)
    if array.dtype != jnp.bool_:
        raise ValueError(f"{name} must be booleans, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    return array
