"""Which pages already hold these tokens: the prefix cache, beside the page table, inside `jax.jit`.

The cache remembers full pages: the tokens in each, and the page before it (its parent), so the
remembered pages form trees whose roots are beginnings of sequences. It is one more holder of its
pages (`page_table.retain`): they stay when their rows are gone, and are evicted when the pool runs
short.

A request's way through it, `salt` naming the tenant, or whatever else must match (an adapter):

    cache, table, done = admit(cache, table, row, tokens, num_tokens, salt)   # row is empty
    cache, table, ok, copies = reserve(cache, table, new_tokens)              # each step, as
    kv = kv_cache.copy_pages(kv, copies)                                      # without the cache
    cache, table = insert(cache, table, row, tokens, salt)                    # when pages filled,
    table = page_table.release(table, mask)                                   # and before this

`admit` lets the row start on the longest cached run: whole pages, and, where a cached page goes on
with the tokens that come next, that page too, shared until the row writes into it (`reserve` orders
the copy). The row's `kv_lens` is then `done`, always less than `num_tokens`.

Matching is exact. A hash finds candidates, but tokens, parent and salt are compared, so equal
hashes make a lookup slower and never share a page. A parent is never forgotten before its children,
so that a parent's id cannot come to mean another page.

Costs: `match` and `insert` are O(tokens passed), vectorised, with a loop over candidates of equal
hash; `reserve` is O(rows) while the pool suffices. One eviction goes over the whole pool, and frees
at least `1 / EVICTION_SHARE` of it, if so much can go. `evict`, `clear` and `held` are O(pool).
"""

from paxattn.prefix_cache.eviction import EVICTION_SHARE, clear, evict, evict_for, reserve
from paxattn.prefix_cache.state import (
    CacheStats,
    PrefixCache,
    check_cache,
    held,
    init_prefix_cache,
)
from paxattn.prefix_cache.steps import SIBLINGS, Match, admit, insert, insert_rows, match
from paxattn.prefix_cache.tokens import copy_tokens, write_tokens

__all__ = [
    "EVICTION_SHARE",
    "SIBLINGS",
    "CacheStats",
    "Match",
    "PrefixCache",
    "admit",
    "check_cache",
    "clear",
    "copy_tokens",
    "evict",
    "evict_for",
    "held",
    "init_prefix_cache",
    "insert",
    "insert_rows",
    "match",
    "reserve",
    "write_tokens",
]
