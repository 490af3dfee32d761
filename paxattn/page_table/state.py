"""The state of the page table: the pytree, and the one place where its sizes are checked."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from paxattn.page_table.inputs import INT32_MAX, check_positive

SLOT_HEADROOM = 2**20  # slots past the pool: inactive tokens get distinct out-of-range ones


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


def _check_product(what: str, **sizes: int) -> None:
    """Two sizes whose product must be an int32, with headroom."""
    (name, size), (other, times) = sizes.items()
    limit = INT32_MAX - SLOT_HEADROOM
    if size * times > limit:
        raise ValueError(
            f"{name}={size} times {other}={times} is {size * times} {what}, which are counted in"
            f" int32: at most {limit}; use {name}={limit // times} at most"
        )


def check_pool(num_pages: int, page_size: int) -> tuple[int, int]:
    """The sizes that a page table and the caches used with it share.

    Raises:
      ValueError: one is not a positive integer, `page_size` is above 256, or the slots would
        overflow int32.
    """
    num_pages = check_positive("num_pages", num_pages)
    page_size = check_positive("page_size", page_size)
    if page_size > 256:
        raise ValueError(f"{page_size=} must be between 1 and 256")
    _check_product("slots", num_pages=num_pages, page_size=page_size)
    return num_pages, page_size


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
        pool, the tokens of a row or the entries of all rows would overflow int32.
    """
    num_pages, page_size = check_pool(num_pages, page_size)
    max_seqs = check_positive("max_seqs", max_seqs)
    max_pages_per_seq = check_positive("max_pages_per_seq", max_pages_per_seq)
    _check_product("tokens of a row", max_pages_per_seq=max_pages_per_seq, page_size=page_size)
    _check_product("block_tables entries", max_seqs=max_seqs, max_pages_per_seq=max_pages_per_seq)
    return PageTable(
        block_tables=jnp.full((max_seqs, max_pages_per_seq), num_pages, jnp.int32),
        kv_lens=jnp.zeros((max_seqs,), jnp.int32),
        ref_counts=jnp.zeros((num_pages,), jnp.int32),
        free_pages=jnp.arange(num_pages, dtype=jnp.int32)[::-1],
        num_free=jnp.asarray(num_pages, jnp.int32),
        page_size=page_size,
    )
