"""What fits: how many sequences a byte budget serves out of pages, against reserving `max_len`.

Plain integers, no arrays: the counts are exact, and agree byte for byte with what
`kv_cache.init_kv_cache` and `page_table.init_page_table` allocate for the same sizes. What the
model itself needs while it runs (activations, the compiler's scratch) is not counted: leave room
for it in the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from paxattn.kv_cache import heads_in_a_row
from paxattn.page_table.inputs import INT32_MAX
from paxattn.page_table.state import SLOT_HEADROOM
from paxattn.quantized import head_bytes, page_dtype

_INT32 = 4
_MOST = INT32_MAX - SLOT_HEADROOM  # slots, and entries of all rows, that a page table may have


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Sizes for a cache and a table, and what they serve.

    Attributes:
      memory_bytes: the budget.
      weight_bytes: the part of it that the weights take.
      cache_bytes: what the cache takes, `num_pages * bytes_per_page`.
      table_bytes: what the page table takes.
      page_size: tokens per page.
      bytes_per_token: keys and values of one token over all layers, scales included.
      bytes_per_page: the same for a page.
      num_pages: pages in the pool: all that fit, those that sequences leave over among them.
      max_pages_per_seq: pages of a sequence of `max_len` tokens.
      max_len: tokens that a sequence may grow to; what naive reservation keeps for each.
      mean_len: tokens of a typical sequence, the shared prefix included.
      shared_pages: whole pages of the prefix, held once for all sequences.
      pages_per_seq: pages that each typical sequence needs beside them.
      sequences_paged: typical sequences that fit at once; the table has a row for each.
      sequences_naive: sequences that fit when each reserves `max_len` tokens.
      utilization_paged: part of the pages in use that holds tokens when all have typical length.
      utilization_naive: part of a reservation of `max_len` that a typical sequence fills.
    """

    memory_bytes: int
    weight_bytes: int
    cache_bytes: int
    table_bytes: int
    page_size: int
    bytes_per_token: int
    bytes_per_page: int
    num_pages: int
    max_pages_per_seq: int
    max_len: int
    mean_len: int
    shared_pages: int
    pages_per_seq: int
    sequences_paged: int
    sequences_naive: int
    utilization_paged: float
    utilization_naive: float

    @property
    def free_bytes(self) -> int:
        """What is left of the budget: less than a page, unless int32 bounds the pool."""
        return self.memory_bytes - self.weight_bytes - self.cache_bytes - self.table_bytes


def bytes_per_token(
    *, num_layers: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike = jnp.bfloat16
) -> int:
    """Bytes of keys and values that one token takes over all layers.

    32 layers, 32 heads of 128 and float16 are 2 * 32 * 32 * 128 * 2 = 524,288 bytes; int8 with its
    scales takes 2 * 32 * 32 * (128 + 2) = 266,240. For a TPU, an odd number of heads of 64 counts
    as one more, see `kv_cache`.
    """
    for name, size in (
        ("num_layers", num_layers),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
    ):
        _at_least(1, name, size)
    heads = int(num_kv_heads)
    if heads % 2:  # (otherwise nobody needs to ask for the device)
        heads += heads_in_a_row(int(head_dim)) - 1
    return 2 * int(num_layers) * heads * head_bytes(int(head_dim), page_dtype(dtype))


def table_bytes(*, num_pages: int, max_seqs: int, max_pages_per_seq: int) -> int:
    """Bytes of a `PageTable`: block tables and lengths, counts and stack, and one counter."""
    return _INT32 * (max_seqs * (max_pages_per_seq + 1) + 2 * num_pages + 1)


def plan(
    *,
    memory_bytes: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    max_len: int,
    mean_len: int,
    weight_bytes: int = 0,
    dtype: DTypeLike = jnp.bfloat16,
    page_size: int = 16,
    shared_prefix: int = 0,
) -> MemoryPlan:
    """Plans a cache and a table for a budget, as many typical sequences as fit.

    Sequences share the whole pages of their prefix; the page it ends in, if it does not end with
    one, is each sequence's own once it has written to it.

    Args:
      memory_bytes: the budget, for weights, cache and table.
      num_layers: layers that keep keys and values.
      num_kv_heads: key/value heads per layer.
      head_dim: elements per head.
      max_len: tokens that a sequence may grow to.
      mean_len: tokens of a typical sequence, the shared prefix included.
      weight_bytes: what the weights take of the budget.
      dtype: of the pages, one of `quantized.PAGE_DTYPES`.
      page_size: tokens per page, 1 to 256.
      shared_prefix: tokens at the start that all sequences share.

    Returns:
      The plan.

    Raises:
      ValueError: a size is out of range, or not even one typical sequence fits; it names the
        figures and what to change.
    """
    max_len, mean_len, page_size, shared_prefix, memory_bytes, weight_bytes = (
        int(x) if isinstance(x, np.integer) else x
        for x in (max_len, mean_len, page_size, shared_prefix, memory_bytes, weight_bytes)
    )
    _check_lengths(max_len, mean_len, page_size, shared_prefix)
    room = _room(memory_bytes, weight_bytes)
    token = bytes_per_token(
        num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype
    )
    page = token * page_size
    width = -(-max_len // page_size)
    shared = shared_prefix // page_size
    own = -(-mean_len // page_size) - shared

    # A page costs its bytes and two table entries; a sequence its pages and a row.
    a_page, a_row, fixed = page + 2 * _INT32, _INT32 * (width + 1), _INT32
    first = fixed + shared * a_page
    a_sequence = own * a_page + a_row
    if first + a_sequence > room:
        raise ValueError(
            f"one sequence of {mean_len=} tokens needs {first + a_sequence} bytes at"
            f" {token} bytes a token, but {room} are free ({memory_bytes=}, {weight_bytes=}):"
            " raise the budget or lower mean_len"
        )
    sequences = (room - first) // a_sequence
    most = _MOST // page_size
    sequences = min(sequences, _MOST // width)
    if own:
        sequences = min(sequences, (most - shared) // own)
    if sequences < 1 or width > most:
        raise ValueError(
            f"sequences of {max_len=} and {mean_len=} tokens overflow the int32 slots of a pool"
            f" ({_MOST}): lower them"
        )
    num_pages = min((room - fixed - sequences * a_row) // a_page, most)
    used = shared + sequences * own
    stored = shared * page_size + sequences * (mean_len - shared * page_size)
    return MemoryPlan(
        memory_bytes=memory_bytes,
        weight_bytes=weight_bytes,
        cache_bytes=num_pages * page,
        table_bytes=table_bytes(num_pages=num_pages, max_seqs=sequences, max_pages_per_seq=width),
        page_size=page_size,
        bytes_per_token=token,
        bytes_per_page=page,
        num_pages=num_pages,
        max_pages_per_seq=width,
        max_len=max_len,
        mean_len=mean_len,
        shared_pages=shared,
        pages_per_seq=own,
        sequences_paged=sequences,
        sequences_naive=room // (max_len * token),
        utilization_paged=stored / (used * page_size),
        utilization_naive=mean_len / max_len,
    )


def _room(memory_bytes: int, weight_bytes: int) -> int:
    """Bytes that the weights leave."""
    _at_least(1, "memory_bytes", memory_bytes)
    _at_least(0, "weight_bytes", weight_bytes)
    if weight_bytes >= memory_bytes:
        raise ValueError(
            f"{weight_bytes=} leaves nothing of {memory_bytes=} for the cache: use a larger"
            " device or a smaller weight dtype"
        )
    return memory_bytes - weight_bytes


def _check_lengths(max_len: int, mean_len: int, page_size: int, shared_prefix: int) -> None:
    _at_least(1, "max_len", max_len)
    _at_least(1, "mean_len", mean_len)
    _at_least(1, "page_size", page_size)
    _at_least(0, "shared_prefix", shared_prefix)
    if page_size > 256:
        raise ValueError(f"{page_size=} must be between 1 and 256")
    if mean_len > max_len:
        raise ValueError(f"{mean_len=} is above {max_len=}: raise max_len or lower mean_len")
    if shared_prefix > mean_len:
        raise ValueError(
            f"{shared_prefix=} is above {mean_len=}, which includes it: raise mean_len"
        )


def _at_least(least: int, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
