"""Forgetting pages, and the `reserve` that does so when the pool runs short."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from paxattn import page_table
from paxattn.page_table import PageCopies, PageTable
from paxattn.page_table.inputs import as_integers
from paxattn.page_table.pages import running_sum, varying_like, when
from paxattn.page_table.steps import pages_wanted
from paxattn.prefix_cache.chains import Chains, unlink
from paxattn.prefix_cache.state import PrefixCache, check_sizes

EVICTION_SHARE = 64  # an eviction frees at least num_pages // EVICTION_SHARE, if so much can go


def reserve(
    cache: PrefixCache,
    table: PageTable,
    new_tokens: ArrayLike,
    *,
    max_new_pages: int = 1,
    max_new_tokens: int | None = None,
) -> tuple[PrefixCache, PageTable, Array, PageCopies]:
    """`page_table.reserve`, with pages that only the cache holds counting as free.

    When the pool is short of what rows need that could be served, cached pages are evicted, in
    the order and of the kind that `evict` says: as many as are missing, and for the sake of the
    next steps at least one in `EVICTION_SHARE` of the pool. Rows that could not be served even so
    evict nothing for themselves.

    No row fails because of the cache. There are two rare cases in which that takes more: pages
    held by the cache alone but with a cached child that a row holds (it came by its beginning in
    another way), and a row about to write into a page that it shares with nobody but the cache,
    when there is nothing left for a copy. If the cache's giving up everything lets a row be served
    that evictions would not, then it does that; rows that still run are remembered again by their
    next `insert`.

    Args:
      cache: the cache.
      table: the table it belongs to.
      new_tokens: i32[R], as for `page_table.reserve`.
      max_new_pages: as for `page_table.reserve`.
      max_new_tokens: as for `page_table.reserve`.

    Returns:
      The cache; then the table, `ok` and the copies to run, as from `page_table.reserve`.
    """
    bound: dict[str, Any] = {"max_new_pages": max_new_pages, "max_new_tokens": max_new_tokens}
    cache, table = evict_for(cache, table, new_tokens, **bound)
    return cache, *page_table.reserve(table, new_tokens, **bound)


def evict_for(
    cache: PrefixCache,
    table: PageTable,
    new_tokens: ArrayLike,
    *,
    max_new_pages: int = 1,
    max_new_tokens: int | None = None,
) -> tuple[PrefixCache, PageTable]:
    """The first half of `reserve`: gives up pages so that `page_table.reserve` finds enough.

    Whoever must not leave anything behind in them scrubs what this step freed before the next.

    Args:
      cache: the cache.
      table: the table it belongs to.
      new_tokens: i32[R], as for `page_table.reserve`.
      max_new_pages: as for `page_table.reserve`.
      max_new_tokens: as for `page_table.reserve`.

    Returns:
      The cache and the table.
    """
    check_sizes(cache, table)
    _, _, pages, wanted = pages_wanted(table, new_tokens, max_new_pages, max_new_tokens)
    short = jnp.sum(wanted, dtype=jnp.int32) > table.num_free

    def make_room(*state: Array) -> tuple[Array, ...]:
        old, now = with_changing(cache, table, state)
        return changing(*forget(old, now, victims(old, now, pages, wanted)))

    state = when(short, make_room, *changing(cache, table))
    return with_changing(cache, table, state)


def evict(
    cache: PrefixCache, table: PageTable, count: ArrayLike
) -> tuple[PrefixCache, PageTable, Array]:
    """Forgets the `count` least recently used of the cached pages that nobody else holds.

    Leaves go before their parents: always the page that has been used least recently among those
    with no cached child, of equal ones (used by the same call) the deepest, and then the one with
    the smallest id. Pages stay that lead to a cached page which somebody else holds too.

    O(num_pages), in one pass however many go.

    Args:
      cache: the cache.
      table: the table it belongs to.
      count: i32[], pages to free; all that there are, if there are fewer.

    Returns:
      The cache, the table, and i32[] the pages freed.
    """
    check_sizes(cache, table)
    count = as_integers("count", count, ())
    gone = least_recent(cache, evictable(cache, table), count)
    cache, table = forget(cache, table, gone)
    return cache, table, jnp.sum(gone, dtype=jnp.int32)


def clear(cache: PrefixCache, table: PageTable) -> tuple[PrefixCache, PageTable]:
    """Forgets everything and returns every hold. The counters stay, and count no evictions."""
    check_sizes(cache, table)
    emptied, table = forget(cache, table, cache.depths > 0)
    return replace(emptied, stats=cache.stats), table


def victims(cache: PrefixCache, table: PageTable, pages: Array, wanted: Array) -> Array:
    """Which pages to evict for what rows want (see `pages_wanted`), bool[num_pages]."""
    cached = cache.depths > 0
    can_go = evictable(cache, table)
    count = jnp.sum(can_go, dtype=jnp.int32)

    def fits(wanted: Array, available: Array) -> tuple[Array, Array]:
        """Pages needed up to and with each row, and whether it is served: it may need none."""
        own = jnp.sum(wanted, axis=1, dtype=jnp.int32)
        need = running_sum(own)
        return need, (need <= available) | (own == 0)

    need, served = fits(wanted, table.num_free + count)
    missing = jnp.max(jnp.where(need <= table.num_free + count, need, 0)) - table.num_free
    some = jnp.where(missing > 0, jnp.maximum(missing, cache.num_pages // EVICTION_SHARE), 0)

    # Were the cache to let go of everything.
    ours = cached.at[pages].get(mode="fill", fill_value=False)
    free = table.num_free + jnp.sum(cached & (table.ref_counts == 1), dtype=jnp.int32)
    _, cleared = fits(wanted & ~(ours & (holders_of(table, pages) == 2)), free)
    helps = cleared & ~served
    return jnp.where(jnp.any(helps), cached, least_recent(cache, can_go, some))


def holders_of(table: PageTable, pages: Array) -> Array:
    """How many hold each page; 0 for the sentinel."""
    return table.ref_counts.at[pages].get(mode="fill", fill_value=0)


def evictable(cache: PrefixCache, table: PageTable) -> Array:
    """Cached pages that nobody else holds, nor any cached page after them, bool[num_pages]."""
    cached = cache.depths > 0
    parents = jnp.where(cached, cache.parents, cache.num_pages)

    def at(array: Array, pages: Array) -> Array:
        return array.at[pages].get(mode="fill", fill_value=array.size)

    def unfinished(state: tuple[Array, Array]) -> Array:
        stays, _ = state
        return jnp.any((stays > 0) & (at(stays, parents) == 0))

    def climb(state: tuple[Array, Array]) -> tuple[Array, Array]:
        stays, above = state
        to = jnp.where(stays > 0, above, cache.num_pages)
        return stays.at[to].set(1, mode="drop"), at(above, above)

    # Doubling: `above` is each page's parent, then the one two up, four up, eight up.
    stays = (cached & (table.ref_counts > 1)).astype(jnp.int32)
    stays, _ = lax.while_loop(unfinished, climb, (stays, parents))
    return cached & (stays == 0)


def least_recent(cache: PrefixCache, among: Array, count: Array) -> Array:
    """The first `count` pages of `among` in the order of eviction, bool[num_pages].

    Children of a page in `among` are, too. They were not used after it, so they come before it: by
    time, or by depth. Selects by bisection, which is much faster than sorting.
    """
    chosen = jnp.zeros_like(among)
    left = jnp.minimum(count, jnp.sum(among, dtype=jnp.int32))
    ids = lax.iota(jnp.int32, among.size)
    for keys in (cache.last_used, among.size - cache.depths, ids):
        bound = largest_bound(keys, among, left)
        below = among & (keys < bound)
        chosen |= below
        left -= jnp.sum(below, dtype=jnp.int32)
        among &= keys == bound
    return chosen


def largest_bound(keys: Array, among: Array, count: Array) -> Array:
    """The largest bound, at most one above the keys, with no more than `count` of `among` below."""

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = low + (high - low + 1) // 2
        fits = jnp.sum(among & (keys < middle), dtype=jnp.int32) <= count
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

    low, high = (
        varying_like(x, keys, among, count) for x in (jnp.zeros_like(count), jnp.max(keys) + 1)
    )
    return lax.while_loop(lambda state: state[0] < state[1], halve, (low, high))[0]


def forget(cache: PrefixCache, table: PageTable, gone: Array) -> tuple[PrefixCache, PageTable]:
    """Gives up the cached pages in `gone` bool[num_pages], which has all children of its pages."""
    count = cache.stats.pages_evicted + jnp.sum(gone, dtype=jnp.uint32)
    by_prefix, by_parent = unlink(cache.by_prefix, gone), unlink(cache.by_parent, gone)
    table = page_table.drop(table, lax.iota(jnp.int32, gone.size), gone)
    gone &= table.num_free >= 0  # always: but now the write comes after the reads
    cache = replace(
        cache,
        depths=jnp.where(gone, 0, cache.depths),
        by_prefix=by_prefix,
        by_parent=by_parent,
        stats=replace(cache.stats, pages_evicted=count),
    )
    return cache, table


def changing(cache: PrefixCache, table: PageTable) -> tuple[Array, ...]:
    """The arrays that eviction changes, as operands for `when`."""
    return (
        cache.depths,
        cache.by_prefix.heads,
        cache.by_prefix.following,
        cache.by_parent.heads,
        cache.by_parent.following,
        cache.stats.pages_evicted,
        table.ref_counts,
        table.free_pages,
        table.num_free,
    )


def with_changing(
    cache: PrefixCache, table: PageTable, state: tuple[Array, ...]
) -> tuple[PrefixCache, PageTable]:
    """Cache and table with these arrays, in the order of `changing`."""
    depths, *lists, evicted, ref_counts, free_pages, num_free = state
    cache = replace(
        cache,
        depths=depths,
        by_prefix=Chains(heads=lists[0], following=lists[1]),
        by_parent=Chains(heads=lists[2], following=lists[3]),
        stats=replace(cache.stats, pages_evicted=evicted),
    )
    table = replace(table, ref_counts=ref_counts, free_pages=free_pages, num_free=num_free)
    return cache, table
