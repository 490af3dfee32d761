"""Which tokens lie in the pages of a pool, cached or not yet.

A loop that notes the tokens of each slot as it writes keys and values there can have its rows'
pages remembered at any time, without a history of its own: forks, beams that move and guesses that
are given back share and leave the tokens with the pages.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from paxattn.page_table import PageCopies, PageTable
from paxattn.page_table.inputs import as_integers
from paxattn.page_table.pages import when
from paxattn.prefix_cache.state import PrefixCache


def write_tokens(cache: PrefixCache, slots: ArrayLike, tokens: ArrayLike) -> PrefixCache:
    """Notes which tokens' keys and values are written to which slots.

    Args:
      cache: the cache.
      slots: i32[T], from `page_table.slot_mapping`: distinct, and out of range for tokens that are
        not stored. So none lies in a cached page: rows do not write into what others hold.
      tokens: i32[T].
    """
    slots = as_integers("slots", slots, None)
    tokens = as_integers("tokens", tokens, slots.shape)
    slots = jnp.where(slots < 0, cache.tokens.size, slots)
    flat = cache.tokens.reshape(-1).at[slots].set(tokens, mode="drop")
    return replace(cache, tokens=flat.reshape(cache.tokens.shape))


def copy_tokens(cache: PrefixCache, copies: PageCopies) -> PrefixCache:
    """Runs the copies that a `reserve` ordered, as `kv_cache.copy_pages` does."""

    def copy(tokens: Array) -> tuple[Array]:
        pages = tokens.at[copies.src].get(mode="fill", fill_value=0)
        return (tokens.at[copies.dst].set(pages, mode="drop"),)

    (tokens,) = when(copies.count > 0, copy, cache.tokens)
    return replace(cache, tokens=tokens)


def row_tokens(cache: PrefixCache, table: PageTable, row: Array) -> Array:
    """The tokens that were noted for a row's pages, i32[max_pages_per_seq * page_size]."""
    pages = table.block_tables.at[row].get(mode="fill", fill_value=table.num_pages)
    return cache.tokens.at[pages].get(mode="fill", fill_value=0).reshape(-1)


def as_pages(table: PageTable, tokens: ArrayLike, num_tokens: Array) -> tuple[Array, Array]:
    """Cuts tokens into pages, i32[K, page_size], as many as a row may have; and their number."""
    tokens = as_integers("tokens", tokens, None)
    size = min(tokens.size, table.max_pages_per_seq * table.page_size)
    tokens = jnp.pad(tokens[:size], (0, -size % table.page_size if size else table.page_size))
    return tokens.reshape(-1, table.page_size), jnp.clip(num_tokens, 0, size)
