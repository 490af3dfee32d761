"""The pool: the page table, the pages, and what the prefix cache knows of them, moved together.

Loops thread one `Pool` through their steps, so that what belongs together cannot come apart: a page
that is reserved is copied before it is written, tokens are noted where their keys and values lie,
rows are remembered before they are released, and pages that were given back are zeroed if asked.
Without a prefix cache a pool is a page table and its pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from paxattn import kv_cache, page_table, prefix_cache
from paxattn.kv_cache import KVCache
from paxattn.page_table import PageTable, init_page_table
from paxattn.prefix_cache import PrefixCache, init_prefix_cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Pool:
    """Pages, who owns them, and which hold what (R rows).

    Attributes:
        table: who owns which page.
        cache: the pages.
        prefix: which pages already hold which tokens; None: nobody remembers.
        salts: i32[R], the salt of each row, see `prefix_cache.match`.
    """

    table: PageTable
    cache: KVCache
    prefix: PrefixCache | None
    salts: jax.Array


def init_pool(
    cache: KVCache, *, max_seqs: int, max_pages_per_seq: int, remember: bool = False
) -> Pool:
    """A pool without rows.

    Args:
        cache: the pages, from `init_kv_cache` or a model's ``init_cache``.
        max_seqs: rows, i.e. sequences alive at once.
        max_pages_per_seq: most pages a row can hold.
        remember: with a prefix cache.

    Raises:
        ValueError: a size is not a positive integer, or too large; see `init_page_table`.
    """
    sizes = {"num_pages": cache.num_pages, "page_size": cache.page_size}
    return Pool(
        table=init_page_table(**sizes, max_seqs=max_seqs, max_pages_per_seq=max_pages_per_seq),
        cache=cache,
        prefix=init_prefix_cache(**sizes) if remember else None,
        salts=jnp.zeros((max_seqs,), jnp.int32),
    )


def make_room(
    pool: Pool, new_tokens: jax.Array, *, max_new_tokens: int, scrub: bool = False
) -> tuple[Pool, jax.Array]:
    """Reserve pages for new tokens, and run the copies that copy-on-write asks for.

    Pages that only the prefix cache holds are evicted when no others are left.

    Args:
        pool: the pool.
        new_tokens: i32[R].
        max_new_tokens: static bound of ``new_tokens``.
        scrub: static; zero pages that are evicted, and shared ones that every holder has left for a
            copy of its own.

    Returns:
        ``(pool, ok bool[R])``, see `page_table.reserve`.
    """
    table, cache, prefix = pool.table, pool.cache, pool.prefix
    if prefix is not None:
        prefix, table = prefix_cache.evict_for(
            prefix, table, new_tokens, max_new_tokens=max_new_tokens
        )
        cache = scrub_freed(cache, pool.table, table) if scrub else cache
    table, ok, copies = page_table.reserve(table, new_tokens, max_new_tokens=max_new_tokens)
    cache = kv_cache.copy_pages(cache, copies)
    if prefix is not None:
        prefix = prefix_cache.copy_tokens(prefix, copies)
    if scrub:
        holders = table.ref_counts.at[copies.src].get(mode="fill", fill_value=1)
        left = jnp.where(holders > 0, table.num_pages, copies.src)
        cache = kv_cache.scrub(cache, left, 0, copies.count)
    return replace(pool, table=table, cache=cache, prefix=prefix), ok


def note_tokens(pool: Pool, slots: jax.Array, tokens: jax.Array) -> Pool:
    """Note which tokens' keys and values lie in which slots, for the prefix cache.

    Whoever writes keys and values, or moves them to other slots, calls this with the same slots.

    Args:
        pool: the pool.
        slots: i32[T], distinct; out of range for tokens that are not stored.
        tokens: i32[T].
    """
    if pool.prefix is None:
        return pool
    return replace(pool, prefix=prefix_cache.write_tokens(pool.prefix, slots, tokens))


def admit_rows(
    pool: Pool, mask: jax.Array, prompts: jax.Array, starts: jax.Array, lens: jax.Array
) -> Pool:
    """Start empty rows on what the prefix cache has of their tokens; without one, do nothing.

    Args:
        pool: the pool.
        mask: bool[R], the rows to start, with their ``salts`` in the pool.
        prompts: i32[N], tokens.
        starts: i32[R], where each row's tokens begin in ``prompts``.
        lens: i32[R], tokens; the last of them is left to compute at least.
    """
    if pool.prefix is None:
        return pool
    width = min(pool.table.max_pages_per_seq * pool.table.page_size, prompts.size)

    def body(state: tuple) -> tuple:
        prefix, table, left = state
        row = jnp.argmax(left).astype(jnp.int32)
        tokens = prompts.at[starts[row] + jnp.arange(width)].get(mode="clip")
        prefix, table, _ = prefix_cache.admit(
            prefix, table, row, tokens, lens[row], pool.salts[row]
        )
        return prefix, table, left.at[row].set(False)

    state = (pool.prefix, pool.table, mask)
    prefix, table, _ = lax.while_loop(lambda state: jnp.any(state[2]), body, state)
    return replace(pool, table=table, prefix=prefix)


def remember_rows(
    pool: Pool,
    mask: jax.Array,
    tokens: jax.Array | None = None,
    lines: jax.Array | None = None,
) -> Pool:
    """Let others find the full pages of rows bool[R]; without a prefix cache, do nothing.

    Args:
        pool: the pool.
        mask: bool[R].
        tokens: i32[K, L], what rows hold; None: as noted, which rows with gaps have lost.
        lines: i32[R], which line of ``tokens`` is a row's.
    """
    if pool.prefix is None:
        return pool
    prefix, table = prefix_cache.insert_rows(
        pool.prefix, pool.table, mask, tokens, pool.salts, lines
    )
    return replace(pool, prefix=prefix, table=table)


def release_rows(
    pool: Pool,
    mask: jax.Array,
    *,
    scrub: bool,
    tokens: jax.Array | None = None,
    lines: jax.Array | None = None,
) -> Pool:
    """Release rows, whose full pages the prefix cache remembers.

    Args:
        pool: the pool.
        mask: bool[R].
        scrub: static; zero the pages that nobody holds any more.
        tokens: see `remember_rows`.
        lines: see `remember_rows`.
    """
    pool = remember_rows(pool, mask, tokens, lines)
    return with_table(pool, page_table.release(pool.table, mask), scrub=scrub)


def leave_behind(pool: Pool, window: int | None, *, scrub: bool) -> Pool:
    """Give back the pages that no layer's sliding window will reach from any row's next token on.

    Args:
        pool: the pool.
        window: static, the widest of the layers' windows in tokens; None: a layer sees everything.
        scrub: static; zero the pages that nobody holds any more.
    """
    if window is None:
        return pool
    table = page_table.discard(pool.table, pool.table.kv_lens + 1 - window)
    return with_table(pool, table, scrub=scrub)


def with_table(pool: Pool, table: PageTable, *, scrub: bool) -> Pool:
    """The pool after a step of its table that takes no pages (`truncate`, `reorder`, `fork`).

    Args:
        pool: the pool before the step.
        table: its table after it.
        scrub: static; zero the pages that the step gave back.
    """
    cache = scrub_freed(pool.cache, pool.table, table) if scrub else pool.cache
    return replace(pool, table=table, cache=cache)


def scrub_freed(cache: KVCache, before: PageTable, after: PageTable) -> KVCache:
    """Zero the pages that a table step gave back: the top of the free stack after it."""
    return kv_cache.scrub(cache, after.free_pages, before.num_free, after.num_free)
