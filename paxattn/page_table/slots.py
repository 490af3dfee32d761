"""Where the tokens of a step are written."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from paxattn.page_table.inputs import as_integers, check_positive
from paxattn.page_table.pages import running_sum_up_to
from paxattn.page_table.state import INT32_MAX, PageTable


def token_rows(q_lens: ArrayLike, num_tokens: int) -> tuple[Array, Array, Array]:
    """Says which row each token of a packed ragged step belongs to.

    Row r's `q_lens[r]` tokens come after those of the rows before it; what is left of the
    `num_tokens` is padding. Tokens past `num_tokens` are cut off, negative `q_lens` count as 0.

    Args:
      q_lens: i32[R], tokens of each row in this step.
      num_tokens: static length T of the packed step.

    Returns:
      rows i32[T] (R for padding, which is out of range), offsets i32[T] of each token among its
      row's (0 for padding), and active bool[T].
    """
    q_lens = as_integers("q_lens", q_lens, None)
    num_tokens = check_positive("num_tokens", num_tokens)
    ends = running_sum_up_to(jnp.clip(q_lens, 0, num_tokens), num_tokens)
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    # Unrolled: log2(R) gathers in one fused kernel, where the default is a loop of kernels.
    rows = jnp.searchsorted(ends, tokens, side="right", method="scan_unrolled").astype(jnp.int32)
    active = rows < q_lens.size
    starts = jnp.pad(ends, (1, 0))[rows]
    return rows, jnp.where(active, tokens - starts, 0), active


def slot_mapping(table: PageTable, q_lens: ArrayLike, num_tokens: int) -> Array:
    """Says where the tokens about to be written go: call it after `reserve`, before `append`.

    Row r writes `q_lens[r]` tokens at positions `kv_lens[r]` and on, packed as in `token_rows`.
    The token at position p of row r goes to slot
    `block_tables[r, p // page_size] * page_size + p % page_size`.

    Args:
      table: the table.
      q_lens: i32[R], tokens of each row in this step.
      num_tokens: static length T of the packed step.

    Returns:
      i32[T] slots, all distinct. Padding, and tokens that must not be written (beyond the pages
      their row holds, or in a page that others hold too), get out-of-range slots
      `num_pages * page_size + t`, which writes drop.

    Raises:
      ValueError: `q_lens` is not one integer per row, or the out-of-range slots would overflow
        int32.
    """
    q_lens = as_integers("q_lens", q_lens, (table.max_seqs,))
    num_pages, page_size = table.num_pages, table.page_size
    if num_pages * page_size + num_tokens > INT32_MAX:
        raise ValueError(
            f"{num_tokens=} with {num_pages=} and {page_size=} overflows int32 slots: write in"
            f" steps of at most {INT32_MAX - num_pages * page_size} tokens"
        )
    rows, offsets, active = token_rows(q_lens, num_tokens)
    positions = table.kv_lens.at[rows].get(mode="fill", fill_value=0) + offsets
    pages = table.block_tables.at[rows, positions // page_size].get(
        mode="fill", fill_value=num_pages
    )
    active &= table.ref_counts.at[pages].get(mode="fill", fill_value=0) == 1
    outside = num_pages * page_size + jnp.arange(num_tokens, dtype=jnp.int32)
    return jnp.where(active, pages * page_size + positions % page_size, outside)
