"""Hash chains over pages: the index of the prefix cache, and the hash.

Every bucket is a linked list through an array over pages. A chain finds candidates and decides
nothing, so long chains (an attacker's, say) cost time and never correctness.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.page_table.pages import running_sum


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Chains:
    """Linked lists of pages, newest first.

    Attributes:
      heads: i32[num_buckets], first page of each list; `num_pages` for none.
      following: i32[num_pages], the page after each page in its list; `num_pages` for none.
    """

    heads: Array
    following: Array


def init_chains(num_pages: int, num_buckets: int) -> Chains:
    """Empty lists."""
    return Chains(
        heads=jnp.full((num_buckets,), num_pages, jnp.int32),
        following=jnp.full((num_pages,), num_pages, jnp.int32),
    )


def mix(x: Array) -> Array:
    """Scrambles u32 one to one.

    "lowbias32" by Chris Wellons, https://nullprogram.com/blog/2018/07/31/.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def prefix_hashes(tokens: Array, salt: Array) -> Array:
    """Hashes of the first 0, 1, .. K pages of i32[K, P] tokens under a salt, u32[K + 1].

    A sum over the tokens, each scrambled with its position, so that all prefixes are had at once.
    """
    positions = lax.iota(jnp.uint32, tokens.size).reshape(tokens.shape) + 1
    scrambled = mix(tokens.astype(jnp.uint32) + positions * jnp.uint32(0x9E3779B9))
    by_page = jnp.sum(scrambled, axis=1, dtype=jnp.uint32).astype(jnp.int32)
    sums = jnp.pad(running_sum(by_page).astype(jnp.uint32), (1, 0))
    return mix(sums + mix(salt.astype(jnp.uint32)))


def bucket_of(chains: Chains, hashes: Array) -> Array:
    """Bucket of each hash, i32."""
    return (hashes % jnp.uint32(chains.heads.size)).astype(jnp.int32)


def first_pages(chains: Chains, hashes: Array) -> Array:
    """Newest page in each hash's list, or `num_pages`."""
    return chains.heads.at[bucket_of(chains, hashes)].get(mode="promise_in_bounds")


def next_pages(chains: Chains, pages: Array) -> Array:
    """The page after each, or `num_pages`; also where the page is `num_pages` itself."""
    return chains.following.at[pages].get(mode="fill", fill_value=chains.following.size)


def link(chains: Chains, pages: Array, hashes: Array, mask: Array) -> Chains:
    """Puts the masked pages, all distinct and in no list, into the lists of their hashes.

    Pages of one list compete for its head, and losers try again: a round per page of the fullest
    bucket, seldom more than two.
    """
    num_pages, num_buckets = chains.following.size, chains.heads.size
    buckets = bucket_of(chains, hashes)
    claims = num_pages + 1 + lax.iota(jnp.int32, pages.size)

    def add(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        heads, following, left, old = state
        to = jnp.where(left, buckets, num_buckets)
        heads = heads.at[to].max(claims, mode="drop")
        won = heads.at[to].get(mode="fill", fill_value=0) == claims
        heads = heads.at[jnp.where(won, buckets, num_buckets)].set(pages, mode="drop")
        following = following.at[jnp.where(won, pages, num_pages)].set(old, mode="drop")
        # Heads are read here for the next round: read in the round that changes them, XLA might
        # put the reading after the change, and copy the array to allow that.
        return heads, following, left & ~won, heads.at[buckets].get(mode="promise_in_bounds")

    state = (chains.heads, chains.following, mask, first_pages(chains, hashes))
    heads, following, _, _ = lax.while_loop(lambda state: jnp.any(state[2]), add, state)
    return Chains(heads=heads, following=following)


def unlink(chains: Chains, gone: Array) -> Chains:
    """Takes the pages in `gone` bool[num_pages] out of their lists, O(pages + buckets).

    Every pointer to such a page moves on to what that page points to, all at once; each round
    doubles the stretch that is skipped.
    """
    num_pages, num_buckets = gone.size, chains.heads.size
    gone = jnp.pad(gone, (0, 1))  # "no page" has an entry here too, and points to itself
    following = jnp.pad(chains.following, (0, 1), constant_values=num_pages)

    def dangling(pointers: Array) -> Array:
        return gone.at[pointers].get(mode="promise_in_bounds")

    def skip(state: tuple[Array, Array]) -> tuple[Array, Array]:
        pointers, moves = state
        past = pointers[num_buckets:].at[pointers].get(mode="promise_in_bounds")
        pointers = jnp.where(moves, past, pointers)
        return pointers, dangling(pointers)

    pointers = jnp.concatenate([chains.heads, following])
    state = (pointers, dangling(pointers))
    pointers, _ = lax.while_loop(lambda state: jnp.any(state[1]), skip, state)
    return Chains(heads=pointers[:num_buckets], following=pointers[num_buckets:-1])
