"""One ragged step: reserve, copy, write, attend, append. Every loop of the library calls it.

So they cannot drift: prefill (here), plain decoding, beam search and speculation differ in the
tokens that they run and in what they make of the hidden states. What cannot be done is data: a row
for which no page is left is reported and left as it was, and the others go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from paxattn import kv_cache, page_table
from paxattn.kv_cache import KVCache
from paxattn.page_table import PageTable
from paxattn.ragged import RaggedBatch, check_same_pool, ragged_batch
from paxattn.tree import Tree


class LanguageModel(Protocol):
    """What a step needs of a model; `paxattn.models.Decoder` is one, yours may be another."""

    def init_cache(
        self, *, num_pages: int, page_size: int, dtype: DTypeLike | None = None
    ) -> KVCache:
        """Allocate pages for this model's layers; None: in the model's own dtype."""

    def __call__(
        self, tokens: jax.Array, batch: RaggedBatch, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Run i32[T] packed tokens; return hidden states ``[T, hidden]`` and the cache."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Turn hidden states ``[K, hidden]`` into f32[K, vocab_size]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PoolUse:
    """How a pool was used, step by step.

    Attributes:
        num_steps: i32[], steps run.
        peak_pages: i32[], most pages held at once.
        page_steps: f32[], pages held, summed over steps.
        token_steps: f32[], tokens of all rows, summed over steps (shared ones once per row).
        row_steps: f32[], rows served, summed over steps.
    """

    num_steps: jax.Array
    peak_pages: jax.Array
    page_steps: jax.Array
    token_steps: jax.Array
    row_steps: jax.Array

    def after(self, table: PageTable) -> PoolUse:
        """One more step, which left this table."""
        held = table.num_pages - table.num_free
        return PoolUse(
            num_steps=self.num_steps + 1,
            peak_pages=jnp.maximum(self.peak_pages, held),
            page_steps=self.page_steps + held.astype(jnp.float32),
            token_steps=self.token_steps + jnp.sum(table.kv_lens).astype(jnp.float32),
            row_steps=self.row_steps + jnp.sum(table.kv_lens > 0).astype(jnp.float32),
        )


def no_use() -> PoolUse:
    """Before the first step."""
    zero, nothing = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    return PoolUse(
        num_steps=zero,
        peak_pages=zero,
        page_steps=nothing,
        token_steps=nothing,
        row_steps=nothing,
    )


def make_room(
    table: PageTable,
    cache: KVCache,
    new_tokens: jax.Array,
    *,
    max_new_tokens: int,
    scrub: bool = False,
) -> tuple[PageTable, KVCache, jax.Array]:
    """Reserve pages for new tokens, and run the copies that copy-on-write asks for.

    Args:
        table: the page table.
        cache: the pages.
        new_tokens: i32[R].
        max_new_tokens: static bound of ``new_tokens``.
        scrub: static; zero shared pages that every holder has left for a copy of its own.

    Returns:
        ``(table, cache, ok bool[R])``, see `page_table.reserve`.
    """
    table, ok, copies = page_table.reserve(
        table, new_tokens, max_new_pages=-(-max_new_tokens // table.page_size)
    )
    cache = kv_cache.copy_pages(cache, copies)
    if scrub:
        holders = table.ref_counts.at[copies.src].get(mode="fill", fill_value=1)
        left = jnp.where(holders > 0, table.num_pages, copies.src)
        cache = kv_cache.scrub(cache, left, 0, copies.count)
    return table, cache, ok


def run_tokens(
    model: LanguageModel,
    table: PageTable,
    cache: KVCache,
    tokens: jax.Array,
    q_lens: jax.Array,
    *,
    live: jax.Array,
    max_q_len: int,
    tree: Tree | None = None,
) -> tuple[PageTable, KVCache, jax.Array]:
    """Write, attend and append, in room that `make_room` made: the second half of `ragged_step`.

    Args:
        model: see `LanguageModel`.
        table: the page table.
        cache: the pages.
        tokens: i32[T], row after row without gaps, padding at the end.
        q_lens: i32[R], how many of them belong to each row.
        live: bool[R], rows that have room; the tokens of others are computed but not stored.
        max_q_len: static upper bound of ``q_lens``.
        tree: static, see `ragged.ragged_batch`.

    Returns:
        ``(table, cache, hidden [T, hidden_size])``.

    Raises:
        ValueError: the cache and the table differ in pages or page size.
    """
    check_same_pool(cache, table)
    batch = ragged_batch(
        table, q_lens, num_tokens=tokens.shape[0], max_q_len=max_q_len, live=live, tree=tree
    )
    hidden, cache = model(tokens, batch, cache)
    table, _ = page_table.append(table, jnp.where(live, q_lens, 0))
    return table, cache, hidden


def ragged_step(
    model: LanguageModel,
    table: PageTable,
    cache: KVCache,
    tokens: jax.Array,
    q_lens: jax.Array,
    *,
    live: jax.Array | None = None,
    max_q_len: int | None = None,
    tree: Tree | None = None,
    scrub: bool = False,
) -> tuple[PageTable, KVCache, jax.Array, jax.Array]:
    """Run new tokens of several rows through the model: reserve, copy, write, attend, append.

    Args:
        model: see `LanguageModel`.
        table: the page table; donate it to the enclosing jit.
        cache: the pages; donate them too.
        tokens: i32[T], row after row without gaps, padding at the end.
        q_lens: i32[R], how many of them belong to each row.
        live: bool[R]; the tokens of other rows are computed but neither stored nor counted.
        max_q_len: static upper bound of ``q_lens``; T by default, 1 for a decode step.
        tree: static, see `ragged.ragged_batch`.
        scrub: see `make_room`.

    Returns:
        ``(table, cache, hidden [T, hidden_size], ok bool[R])``. A live row for which no room could
        be had is not ok: it is left as it was, and its hidden states mean nothing.

    Raises:
        ValueError: the cache and the table differ in pages or page size.
    """
    max_q_len = tokens.shape[0] if max_q_len is None else max_q_len
    new_tokens = q_lens if live is None else jnp.where(live, q_lens, 0)
    table, cache, ok = make_room(table, cache, new_tokens, max_new_tokens=max_q_len, scrub=scrub)
    stored = ok if live is None else live & ok
    table, cache, hidden = run_tokens(
        model, table, cache, tokens, q_lens, live=stored, max_q_len=max_q_len, tree=tree
    )
    return table, cache, hidden, ok


def scrub_freed(cache: KVCache, before: PageTable, after: PageTable) -> KVCache:
    """Zero the pages that a table step gave back: the top of the free stack after it."""
    return kv_cache.scrub(cache, after.free_pages, before.num_free, after.num_free)


def release_rows(
    table: PageTable, cache: KVCache, mask: jax.Array, *, scrub: bool
) -> tuple[PageTable, KVCache]:
    """Release rows; with ``scrub`` zero the pages that nobody holds any more."""
    freed = page_table.release(table, mask)
    return freed, scrub_freed(cache, table, freed) if scrub else cache


def prefill(
    model: LanguageModel,
    table: PageTable,
    cache: KVCache,
    use: PoolUse,
    prompts: jax.Array,
    starts: jax.Array,
    lens: jax.Array,
    *,
    chunk: int,
    scrub: bool = False,
) -> tuple[PageTable, KVCache, PoolUse, jax.Array]:
    """Store the rows' tokens, in chunks of packed tokens of as many rows as fit.

    What a row holds already (its ``kv_lens`` first tokens) is not computed again. Of the rows that
    find no page in a step only the first ends and gives its pages back: they may let the others go
    on. So every step either stores tokens or ends a row.

    Args:
        model: see `LanguageModel`.
        table: donate it to the enclosing jit.
        cache: donate it too.
        use: how the pool was used before.
        prompts: i32[N], tokens.
        starts: i32[R], where each row's tokens begin in ``prompts``; rows may share them.
        lens: i32[R], tokens to store; 0 leaves a row as it is.
        chunk: static tokens per step.
        scrub: static; zero the pages of rows that end.

    Returns:
        ``(table, cache, use, ok bool[R])``; rows that are not ok are empty.
    """

    def left(table: PageTable, failed: jax.Array) -> jax.Array:
        return jnp.where(failed, 0, jnp.maximum(lens - table.kv_lens, 0))

    def body(carry: tuple) -> tuple:
        table, cache, use, failed = carry
        todo = left(table, failed)
        q_lens = jnp.clip(chunk - (jnp.cumsum(todo) - todo), 0, todo)
        rows, offsets, _ = page_table.token_rows(q_lens, chunk)
        tokens = prompts.at[starts[rows] + table.kv_lens[rows] + offsets].get(mode="clip")
        table, cache, _, ok = ragged_step(model, table, cache, tokens, q_lens)
        use = use.after(table)
        ends = first_only(~ok)
        table, cache = release_rows(table, cache, ends, scrub=scrub)
        return table, cache, use, failed | ends

    carry = lax.while_loop(
        lambda carry: jnp.any(left(carry[0], carry[3]) > 0),
        body,
        (table, cache, use, jnp.zeros(lens.shape, bool)),
    )
    return *carry[:3], ~carry[3]


def first_only(mask: jax.Array) -> jax.Array:
    """The mask without all but its first True."""
    return mask & (jnp.cumsum(mask) == 1)
