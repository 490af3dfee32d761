"""The state of the prefix cache: the pytree, where it is made, and its check on the host."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from paxattn.page_table import InvariantError, PageTable
from paxattn.page_table.inputs import INT32_MAX, as_integers, check_positive
from paxattn.page_table.state import check_pool
from paxattn.prefix_cache.chains import Chains, init_chains


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """What the cache did since it was made, u32[] each. They wrap at 2**32: take differences.

    Attributes:
      lookups: prompts that `admit` looked up.
      hits: how many of those found at least one token.
      tokens_asked: tokens of those prompts.
      tokens_saved: how many of them need no computing.
      pages_inserted: pages remembered.
      pages_evicted: pages forgotten to make room.
    """

    lookups: Array
    hits: Array
    tokens_asked: Array
    tokens_saved: Array
    pages_inserted: Array
    pages_evicted: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PrefixCache:
    """The cache's whole state, a pytree; the arrays over pages are indexed by page id.

    Of a page that is not cached (`depths` 0) only `tokens` may mean something: what was written to
    it while a row held it (see `write_tokens`).

    Attributes:
      tokens: i32[num_pages, page_size], tokens of each page.
      parents: i32[num_pages], the page before it; `num_pages` for the first of a sequence.
      salts: i32[num_pages], the salt it was inserted with.
      depths: i32[num_pages], pages from the beginning of the sequence, this one included; 0 for
        pages that are not cached.
      last_used: i32[num_pages], `clock` when it was last adopted or inserted. Whoever uses a page
        uses its parent, so no page is older than its children.
      by_prefix: the pages, by the hash of all tokens up to their end.
      by_parent: the pages, by the hash of all tokens up to their beginning.
      clock: i32[], uses so far.
      stats: counters.
    """

    tokens: Array
    parents: Array
    salts: Array
    depths: Array
    last_used: Array
    by_prefix: Chains
    by_parent: Chains
    clock: Array
    stats: CacheStats

    @property
    def num_pages(self) -> int:
        """Pages in the pool; also the sentinel that means "no page"."""
        return self.tokens.shape[-2]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.tokens.shape[-1]


def init_prefix_cache(
    *, num_pages: int, page_size: int, num_buckets: int | None = None
) -> PrefixCache:
    """Makes an empty cache for a page table of the same sizes.

    Args:
      num_pages: pages in the pool, as in the table.
      page_size: tokens per page, as in the table.
      num_buckets: of each of the two hash indexes; twice the pages by default.

    Returns:
      The cache; `4 * (num_pages * (page_size + 6) + 2 * num_buckets)` bytes and a few.

    Raises:
      ValueError: a size is not a positive integer, or too large, as for `init_page_table`.
    """
    num_pages, page_size = check_pool(num_pages, page_size)
    buckets = check_positive("num_buckets", 2 * num_pages if num_buckets is None else num_buckets)

    def zeros() -> Array:  # each field its own array, or they could not all be donated
        return jnp.zeros((num_pages,), jnp.int32)

    names = CacheStats.__dataclass_fields__
    return PrefixCache(
        tokens=jnp.zeros((num_pages, page_size), jnp.int32),
        parents=zeros(),
        salts=zeros(),
        depths=zeros(),
        last_used=zeros(),
        by_prefix=init_chains(num_pages, buckets),
        by_parent=init_chains(num_pages, buckets),
        clock=jnp.zeros((), jnp.int32),
        stats=CacheStats(**{name: jnp.zeros((), jnp.uint32) for name in names}),
    )


def held(cache: PrefixCache) -> Array:
    """Holds that the cache has on each page, i32[num_pages]: 1 if cached, else 0.

    For `page_table.check_invariants(table, held_elsewhere=held(cache))`. O(num_pages).
    """
    return (cache.depths > 0).astype(jnp.int32)


def check_sizes(cache: PrefixCache, table: PageTable) -> None:
    """Raises if a cache does not belong to a table of these sizes."""
    if (cache.num_pages, cache.page_size) != (table.num_pages, table.page_size):
        raise ValueError(
            f"{cache.num_pages=} and {cache.page_size=} must be {table.num_pages=} and"
            f" {table.page_size=}: make both with the same sizes"
        )


def as_salts(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Salts as i32. Larger ones are refused where they can be seen: cut off, two would be one."""
    if not isinstance(value, jax.core.Tracer):
        known = np.asarray(value)
        if known.dtype.kind in "iu":
            beyond = known[(known > INT32_MAX) | (known < -INT32_MAX - 1)]
            if beyond.size:
                raise ValueError(f"{name} has {beyond[0]}: must be from -2**31 to 2**31 - 1")
    return as_integers(name, value, shape)


def check_cache(cache: PrefixCache) -> None:
    """Checks on the host that a cache is consistent.

    Args:
      cache: a cache with concrete arrays (not inside jit), without leading axes.

    Raises:
      InvariantError: naming what is wrong.
    """
    cache = jax.tree.map(np.asarray, jax.device_get(cache))
    cached = np.flatnonzero(cache.depths)
    parents, depths = cache.parents[cached], cache.depths[cached]

    def need(good: ArrayLike, what: str) -> None:
        if not np.all(good):
            raise InvariantError(f"{what}: pages {cached[~np.asarray(good)][:5].tolist()}")

    need(depths > 0, "negative depths")
    need((parents >= 0) & (parents <= cache.num_pages), "parents out of range")
    need((depths == 1) == (parents == cache.num_pages), "depth 1 and a parent, or neither")
    need(cache.last_used[cached] <= cache.clock, "used in the future")
    inner = parents < cache.num_pages
    up = np.where(inner, parents, 0)
    need(~inner | (cache.depths[up] == depths - 1), "parents forgotten, or of another depth")
    need(~inner | (cache.salts[up] == cache.salts[cached]), "parents of another salt")
    need(~inner | (cache.last_used[up] >= cache.last_used[cached]), "older than their children")
    keys = np.column_stack([parents, cache.salts[cached], cache.tokens[cached]])
    if len(np.unique(keys, axis=0)) < len(keys):
        raise InvariantError("the same tokens cached twice after the same parent")
    for name, chains in (("by_prefix", cache.by_prefix), ("by_parent", cache.by_parent)):
        seen: list[int] = []
        for page in chains.heads.tolist():
            while page < cache.num_pages and len(seen) <= len(cached):
                seen.append(page)
                page = int(chains.following[page])
        if sorted(seen) != cached.tolist():
            raise InvariantError(f"{name} lists {len(seen)} pages, {len(cached)} are cached")
