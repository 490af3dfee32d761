"""A ragged batch: which tokens one step runs, where they belong and where their KV goes.

One step serves rows with unequal numbers of new tokens (prefill, decode, or both), packed one row
after the other without gaps. Everything that the layers need to know about that packing is worked
out here once per step and shared by all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from paxattn.kv_cache import KVCache
from paxattn.page_table import PageTable, slot_mapping, token_rows
from paxattn.page_table.inputs import as_integers, as_mask
from paxattn.page_table.pages import running_sum_up_to
from paxattn.shared_prefix import SharedPrefix, find_shared_prefix
from paxattn.tree import Tree, tree_arrays

# What rows share is looked for in steps of at most so many new tokens per row (those with more have
# work enough to pay for reading the pages) and at least so many rows (fewer gain too little to be
# worth compiling a second attention for).
_SHORT, _MANY = 32, 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RaggedBatch:
    """The tokens of one step (R rows, M pages per row at most, T packed tokens).

    Attributes:
        block_tables: i32[R, M], the table's.
        kv_lens: i32[R], tokens per row *including* those that this step stores.
        cu_q_lens: i32[R + 1], prefix sum of the rows' new tokens: row ``r`` owns the packed tokens
            ``cu_q_lens[r]:cu_q_lens[r + 1]``; tokens from ``cu_q_lens[R]`` on are padding.
        rows: i32[T], the row of each token (R, out of range, for padding).
        positions: i32[T], the place of each token in its sequence (0 for padding); in a tree of
            guesses, by depth: siblings stand in the same place.
        slots: i32[T], where each token's K and V are written; out of range for tokens that are not
            stored.
        max_q_len: static upper bound of a row's new tokens; 1 means a decode step.
        num_pages: static, the table's pages.
        page_size: static, its tokens per page.
        ancestors: u32[T], which of its row's new tokens each token sees, where they form a tree
            (see `attention.paged_attention`); None: those before it.
        shared: what rows have in common, for `attention.paged_attention` to read once; None in a
            step of long rows or of very few.
    """

    block_tables: jax.Array
    kv_lens: jax.Array
    cu_q_lens: jax.Array
    rows: jax.Array
    positions: jax.Array
    slots: jax.Array
    max_q_len: int = field(metadata={"static": True})
    num_pages: int = field(metadata={"static": True})
    page_size: int = field(metadata={"static": True})
    ancestors: jax.Array | None = None
    shared: SharedPrefix | None = None


def fitting_rows(q_lens: jax.Array, num_tokens: int, max_q_len: int) -> jax.Array:
    """Rows of at most ``max_q_len`` tokens, all among the batch's first ``num_tokens``, bool[R]."""
    short = q_lens <= max_q_len
    if q_lens.size * max_q_len <= num_tokens:
        return short
    over = num_tokens + 1
    return short & (running_sum_up_to(jnp.clip(q_lens, 0, over), over) < over)


def ragged_batch(
    table: PageTable,
    q_lens: ArrayLike,
    *,
    num_tokens: int,
    max_q_len: int | None = None,
    live: ArrayLike | None = None,
    tree: Tree | None = None,
) -> RaggedBatch:
    """Describe a step that adds ``q_lens[r]`` tokens to row ``r``.

    Call it after `page_table.reserve` made room and before `page_table.append` counts the tokens.

    Args:
        table: the page table, ``kv_lens`` not yet advanced.
        q_lens: i32[R], new tokens per row. Inside jit, rows of more than ``max_q_len`` tokens, or
            whose tokens end beyond ``num_tokens``, are as if not live.
        num_tokens: static number of packed tokens T, padding included.
        max_q_len: static upper bound of ``q_lens``; ``num_tokens`` by default.
        live: bool[R], rows whose tokens are stored, such as those for which `page_table.reserve`
            found room; all by default. Tokens of the others are computed, and mean nothing.
        tree: static; a row's new tokens are the first so many nodes of this tree. None: a chain.

    Raises:
        ValueError: ``max_q_len`` is not in ``1..num_tokens``, ``q_lens`` or ``live`` is not one
            integer or boolean per row, or outside jit and without ``live`` a row does not fit.
    """
    max_q_len = num_tokens if max_q_len is None else max_q_len
    if not 1 <= max_q_len <= num_tokens:
        raise ValueError(f"{max_q_len=} must be between 1 and {num_tokens=}")
    if tree is not None and max_q_len > len(tree.parents):
        raise ValueError(f"{max_q_len=} must be at most {len(tree.parents)}, the nodes of the tree")
    q_lens = as_integers("q_lens", q_lens, (table.max_seqs,))
    rows, offsets, active = token_rows(q_lens, num_tokens)
    slots = slot_mapping(table, q_lens, num_tokens)
    stored = fitting_rows(q_lens, num_tokens, max_q_len)
    if live is not None:
        stored &= as_mask("live", live, q_lens.shape)
    elif not isinstance(q_lens, jax.core.Tracer):
        _check_fit(np.asarray(q_lens), num_tokens, max_q_len)
    outside = table.num_pages * table.page_size + jnp.arange(num_tokens, dtype=jnp.int32)
    slots = jnp.where(stored[rows], slots, outside)
    first = jnp.zeros_like(q_lens, shape=(1,))
    cu_q_lens = jnp.concatenate([first, jnp.cumsum(q_lens, dtype=jnp.int32)])
    kv_lens = table.kv_lens + jnp.where(stored, q_lens, 0)
    ancestors, shared = None, None
    if tree is not None:
        masks, depths = tree_arrays(tree)
        ancestors, offsets = masks[offsets], depths[offsets]
    if max_q_len <= _SHORT and kv_lens.size >= _MANY:
        shared = find_shared_prefix(
            table.block_tables,
            kv_lens,
            cu_q_lens,
            num_tokens=num_tokens,
            page_size=table.page_size,
            num_pages=table.num_pages,
        )
    return RaggedBatch(
        block_tables=table.block_tables,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        rows=rows,
        positions=jnp.where(active, table.kv_lens[rows] + offsets, 0),
        slots=slots,
        ancestors=ancestors,
        shared=shared,
        max_q_len=max_q_len,
        num_pages=table.num_pages,
        page_size=table.page_size,
    )


def _check_fit(q_lens: np.ndarray, num_tokens: int, max_q_len: int) -> None:
    if q_lens.max(initial=0) > max_q_len:
        raise ValueError(
            f"q_lens has a row of {q_lens.max()} new tokens, more than {max_q_len=}: raise that"
        )
    total = np.maximum(q_lens, 0).sum(dtype=np.int64)
    if total > num_tokens:
        raise ValueError(f"q_lens has {total} tokens in all, more than {num_tokens=}: raise that")


def check_same_pool(cache: KVCache, pages: PageTable | RaggedBatch) -> None:
    """Check that a cache was made with the sizes of the table that tells its pages.

    Raises:
        ValueError: it was not; names the sizes.
    """
    if (cache.num_pages, cache.page_size) != (pages.num_pages, pages.page_size):
        raise ValueError(
            f"the cache has {cache.num_pages} pages of {cache.page_size} tokens, the page table "
            f"{pages.num_pages} of {pages.page_size}: make both with the same sizes"
        )
