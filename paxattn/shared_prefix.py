"""Which rows of a step begin with the same pages, so that attention can read those once for all.

Samples of a prompt, beams of a search and requests that met the same cached prompt hold the same
physical pages at the front of their block tables. Attention over these can be computed once per
*group* of such rows, for all the queries of the group, and merged with what each row sees of its
own (Juravsky et al., 2024, Hydragen, https://arxiv.org/abs/2402.05099; FlashInfer's cascade). What
that takes is found here once per step, from the table alone, and serves all layers.

A group is a run of rows that follow each other; rows without stored tokens in between do not part
it. Only whole pages that lie before every query of the group are shared, so that each of its
queries sees all of them.

Letters: R rows, M `max_pages_per_seq`, T packed tokens, P `page_size`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from paxattn.page_table import token_rows
from paxattn.page_table.pages import pages_for, running_sum, varying_like

# A group is computed in tiles for many queries, which cost the same however few fill them: fewer
# rows, or less than a quarter of the batch (or of a tile), read their pages faster on their own.
_SMALLEST_GROUP = 4
_TILE = 128
# Reading a page once more costs less than it takes to merge: share what saves a quarter.
_WORTHWHILE = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SharedPrefix:
    """One ragged batch as two: the groups on what their rows share, the rows on what is left.

    Attributes:
        pays: bool[], False if there is no group, or too little to share: then the rest is all.
        members: bool[T], the tokens of rows that are in a group of several.
        group_tables: i32[R, M], the pages of each group's first row.
        group_kv_lens: i32[R], shared tokens of each group, a multiple of P; 0 for rows alone.
        group_cu_q_lens: i32[R + 1], where the groups' queries begin in the packed batch.
        rest_tables: i32[R, M], the rows' pages past the shared ones.
        rest_kv_lens: i32[R], the rows' tokens past the shared ones.
    """

    pays: jax.Array
    members: jax.Array
    group_tables: jax.Array
    group_kv_lens: jax.Array
    group_cu_q_lens: jax.Array
    rest_tables: jax.Array
    rest_kv_lens: jax.Array


def find_shared_prefix(
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    *,
    num_tokens: int,
    page_size: int,
    num_pages: int,
) -> SharedPrefix:
    """Find the groups whose sharing saves most, and say whether it pays.

    Costs O(R x M) comparisons of integers, and where anything is shared O(R x R x log M) more.

    Args:
        block_tables: i32[R, M].
        kv_lens: i32[R], tokens stored, the new ones included.
        cu_q_lens: i32[R + 1], running sum of new tokens.
        num_tokens: T.
        page_size: P.
        num_pages: pages in the pool; numbers from there on are no page.

    Returns:
        What `attention.cascade.attend_shared` needs.
    """
    everything = block_tables, kv_lens, cu_q_lens
    block_tables, kv_lens, cu_q_lens = (varying_like(x, *everything) for x in everything)
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    live = (q_lens > 0) & (kv_lens >= q_lens)
    common = _common_pages(block_tables, kv_lens - q_lens, live, page_size, num_pages)

    def look() -> tuple[jax.Array, ...]:
        return _split(block_tables, kv_lens, cu_q_lens, live, common, page_size, num_pages)

    def nothing() -> tuple[jax.Array, ...]:
        none = jnp.zeros_like(kv_lens)
        return jnp.any(none > 0), block_tables, none, cu_q_lens, block_tables, kv_lens, none > 0

    found = lax.cond(jnp.any(common > 0), look, nothing)
    pays, tables, lens, starts, rest_tables, rest_lens, shares = found
    row, _, _ = token_rows(q_lens, num_tokens)
    return SharedPrefix(
        pays=pays,
        members=shares.at[row].get(mode="fill", fill_value=False),
        group_tables=tables,
        group_kv_lens=lens,
        group_cu_q_lens=starts,
        rest_tables=rest_tables,
        rest_kv_lens=rest_lens,
    )


def _common_pages(
    block_tables: jax.Array, history: jax.Array, live: jax.Array, page_size: int, num_pages: int
) -> jax.Array:
    """How many pages each live row has in common with the live row before it, i32[R]."""
    latest = lax.cummax(jnp.where(live, jnp.arange(live.size, dtype=jnp.int32), -1))
    before = jnp.pad(latest[:-1], (1, 0), constant_values=-1)
    other = jnp.maximum(before, 0)
    same = (block_tables == block_tables[other]) & (block_tables >= 0) & (block_tables < num_pages)
    entry = jnp.arange(block_tables.shape[1], dtype=jnp.int32)
    run = jnp.min(jnp.where(same, entry.size, entry), axis=1)
    whole = history // page_size
    run = jnp.minimum(run, jnp.minimum(whole, whole[other]))
    return jnp.where(live & (before >= 0), run, 0)


def _group(
    common: jax.Array, live: jax.Array, bound: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Parts the rows where they have less than `bound` pages in common.

    Rows are compared with rows, [R, R]: a CPU runs scatters into groups one index at a time.

    Returns:
        Per row: the number of its group i32[R], whether it begins one bool[R], the pages that its
        group shares i32[R]; and how many reads of pages that saves, i32[].
    """
    begins = live & (common < bound)
    group = running_sum(begins.astype(jnp.int32)) - 1
    together = live & (group == group[:, None])
    size = jnp.sum(together, axis=1, dtype=jnp.int32)
    most = jnp.iinfo(jnp.int32).max
    pages = jnp.min(jnp.where(together & ~begins, common, most), axis=1)
    enough = max(_SMALLEST_GROUP, min(live.size, _TILE) // 4)
    pages = jnp.where(live & (size >= enough), pages, 0)
    return group, begins, pages, jnp.sum(jnp.where(begins, 0, pages), dtype=jnp.int32)


def _split(
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    live: jax.Array,
    common: jax.Array,
    page_size: int,
    num_pages: int,
) -> tuple[jax.Array, ...]:
    """Groups the rows: the fields of `SharedPrefix` in order, but which rows share for `members`.

    A group ends where a row shares less than so many pages with the one before. Of a few such
    bounds the one that saves most is taken (samples share their prompt, prompts a system prompt).
    """
    num_rows, width = block_tables.shape
    bounds = jnp.asarray([1 << i for i in range(width.bit_length())], jnp.int32)
    tried = jax.vmap(lambda bound: _group(common, live, bound))(bounds)
    best = jnp.argmax(tried[-1])
    group, begins, pages, saved = (x[best] for x in tried)
    held = jnp.where(live, pages_for(kv_lens, page_size), 0)
    # Rows may walk their pages in step: then the longest must become shorter too.
    pays = (saved * _WORTHWHILE > jnp.sum(held, dtype=jnp.int32)) & (
        jnp.max(held - pages) * _WORTHWHILE < jnp.max(held) * (_WORTHWHILE - 1)
    )
    pages = jnp.where(pays, pages, 0)

    row = jnp.arange(num_rows, dtype=jnp.int32)
    first = jnp.min(jnp.where(begins & (group == row[:, None]), row, num_rows), axis=1)
    inside = jnp.minimum(first, num_rows - 1)
    # Rows without tokens may come before the first group.
    starts = jnp.where(row > 0, cu_q_lens[first], 0)
    entry = pages[:, None] + jnp.arange(width, dtype=jnp.int32)
    rest = jnp.take_along_axis(block_tables, jnp.minimum(entry, width - 1), axis=1)
    return (
        pays,
        block_tables[inside],
        jnp.where(first < num_rows, pages[inside], 0) * page_size,
        jnp.append(starts, cu_q_lens[-1]),
        jnp.where(entry < width, rest, num_pages),
        kv_lens - pages * page_size,
        pages > 0,
    )
