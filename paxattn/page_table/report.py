"""Diagnostics: exact counts, and a check of the invariants on the host."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from paxattn.page_table.pages import leaves
from paxattn.page_table.state import INT32_MAX, PageTable


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Utilization:
    """How well the pool is used: exact counts, i32[] each.

    Rows that share pages may store more tokens than an int32 can count: then it says 2**31 - 1.

    Attributes:
      num_pages: pages in the pool.
      pages_held: pages off the free stack, whoever holds them.
      pages_in_rows: distinct pages that rows hold.
      tokens_stored: tokens of all rows that lie in pages; shared ones count in every row.
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
    fill = jnp.where(table.block_tables < table.num_pages, fill, 0)
    # One more than the fill, so that a page held empty differs from one not held by any row.
    filled = jnp.zeros_like(table.ref_counts).at[table.block_tables].max(fill + 1, mode="drop")
    in_rows = jnp.sum(filled > 0, dtype=jnp.int32)
    stored = _sum_up_to_int32(fill)
    return Utilization(
        num_pages=jnp.asarray(table.num_pages, jnp.int32),
        pages_held=table.num_pages - table.num_free,
        pages_in_rows=in_rows,
        tokens_stored=stored,
        tokens_shared=stored - (jnp.sum(filled, dtype=jnp.int32) - in_rows),
        slots_in_rows=in_rows * page_size,
    )


def _sum_up_to_int32(x: Array) -> Array:
    """The sum of numbers that are not negative, or 2**31 - 1 if it is beyond."""
    return lax.reduce(x, np.int32(0), lambda a, b: jnp.minimum(a, INT32_MAX - b) + b, range(x.ndim))


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
    tables, lens, refs, stack, num_free = (np.asarray(x) for x in jax.device_get(leaves(table)))
    num_pages, page_size = table.num_pages, table.page_size
    elsewhere = np.zeros(num_pages, np.int64)
    if held_elsewhere is not None:
        elsewhere = np.asarray(held_elsewhere, np.int64)

    def need(good: np.ndarray | bool, what: str) -> None:
        if not np.all(good):
            where = np.argwhere(~np.atleast_1d(good))
            raise InvariantError(f"{what}: {len(where)} wrong, first at {where[0].tolist()}")

    for name, x, shape in (
        ("block_tables", tables, tables.shape[-2:]),
        ("kv_lens", lens, tables.shape[-2:-1]),
        ("ref_counts", refs, (num_pages,)),
        ("free_pages", stack, (num_pages,)),
        ("num_free", num_free, ()),
        ("held_elsewhere", elsewhere, (num_pages,)),
    ):
        if x.shape != shape:
            raise InvariantError(f"{name} has shape {x.shape}, expected {shape}")
    need((tables >= 0) & (tables <= num_pages), f"block_tables entries outside 0..{num_pages}")
    held = tables < num_pages
    need(lens >= 0, "negative kv_lens")
    # What was discarded comes before the page with the last token.
    last = np.maximum(-(-lens // page_size) - 1, 0)
    inside = np.pad(held, ((0, 0), (0, 1)))[np.arange(len(lens)), np.minimum(last, held.shape[1])]
    need(inside | (lens == 0), "kv_lens beyond the pages held")
    entry = np.arange(held.shape[1])
    before, after = entry[:-1] < last[:, None], entry[1:] > last[:, None]
    need(~(held[:, :-1] & before) | held[:, 1:], "unused entries of block_tables between pages")
    need(held[:, :-1] | ~(held[:, 1:] & after), "pages after an unused entry of block_tables")
    holders = np.bincount(tables[held], minlength=num_pages) + elsewhere
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
