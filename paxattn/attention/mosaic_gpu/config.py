"""What both kernels for Hopper can serve, and the decode kernel's untuned block sizes.

Nothing here imports Mosaic GPU: the choice of an implementation asks for it on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from paxattn.attention.checks import Request

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
QUANTIZED_HEAD_DIMS = (64, 128, 256)  # of quantised pages
SHARED_BYTES = 227 * 1024  # per multiprocessor of Hopper, less what the system keeps
_RESERVED_BYTES = 3 * 1024  # per thread block: barriers, the reductions' scratch, alignment


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the decode kernel is cut.

    Attributes:
        block_kv: tokens per block, a multiple of 64; a multiple or a divisor of the page size.
        stages: blocks of K and of V in flight per thread block.
        num_cores: thread blocks; those that run at the same time do all the work.
        split: tokens per item, a multiple of `block_kv`, for results that do not depend on the
            batch, bit for bit. None: items of equal cost.
    """

    block_kv: int
    stages: int
    num_cores: int
    split: int | None = None


def max_rows(head_dim: int, *, quantized: bool = False) -> int:
    """Packed query rows (tokens x group) of a KV head that a tile may hold: registers end there.

    (Beyond, ptxas spills: of head_dim 80 and 128 already with 64 rows, of 128 with 56.)
    """
    if head_dim <= 64:
        return 64
    if head_dim <= 128:
        return 48
    return 16 if quantized else 24


def why_not(request: Request) -> str:
    """What keeps the decode kernel for Hopper from a request, or "" if nothing does."""
    if request.page_dtype is None or request.head_dim in QUANTIZED_HEAD_DIMS:
        return ""
    return f"it reads quantised pages of head_dim {', '.join(map(str, QUANTIZED_HEAD_DIMS))} only"


def short_q_len(max_q_len: int, group: int, head_dim: int, most: int | None = None) -> int:
    """New tokens that a row may have to be served by the decode kernel; rows with more are long.

    If even the longest row fits, there are no long ones. Else, in a mixed batch, those rows are
    short that fit a tile of 16 packed rows (one token of a larger group): nearly all have a single
    new token, and would pay for a larger tile with every block.

    Args:
        max_q_len: bound on the new tokens of a row.
        group: query heads per KV head.
        head_dim: elements per head.
        most: packed query rows that a tile may hold; None: `max_rows`.

    Returns:
        The bound, from 0 (the group is too large: all rows are long) to `max_q_len`.
    """
    most = most or max_rows(head_dim)
    if max_q_len * group <= most:
        return max_q_len
    return max(16 // group, 1) if group <= most else 0


def packed_rows(max_q_len: int, group: int) -> int:
    """Rows of a query tile: tokens x group in whole multiples of 8, as the tensor cores want."""
    return -(-max_q_len * group // 8) * 8


def value_dim(head_dim: int) -> int:
    """Columns of the kernel's output: the tensor cores compute 64 rows of `V^T P^T` at a time."""
    return -(-head_dim // 64) * 64


def wide_dtype(page_dtype: Any) -> str:
    """What quantised numbers are widened to: what the hardware converts them to, and exactly."""
    return "bfloat16" if jnp.dtype(page_dtype).name == "int8" else "float16"


def shared_bytes(config: Config, *, rows: int, head_dim: int, quantized: bool = False) -> int:
    """Bytes of shared memory that a thread block's arrays take.

    Args:
        config: the config.
        rows: of a query tile, from `packed_rows`.
        head_dim: elements per head.
        quantized: whether pages are.

    Returns:
        The sum over the ring of K and V, two query tiles and the tile of probabilities; of
        quantised pages, also the scales, and a block that is widened.
    """
    ring = 2 * config.stages * config.block_kv * head_dim
    rest = 2 * rows * head_dim + rows * config.block_kv
    if quantized:
        return ring + 2 * (2 * config.stages + head_dim) * config.block_kv + 2 * rest
    return 2 * (ring + rest)


def fits(config: Config, per_sm: int, rows: int, head_dim: int, *, quantized: bool = False) -> bool:
    """Whether `per_sm` thread blocks have shared memory enough on a multiprocessor."""
    room = SHARED_BYTES // per_sm - _RESERVED_BYTES
    return shared_bytes(config, rows=rows, head_dim=head_dim, quantized=quantized) <= room


def may_share(*, rows: int, head_dim: int, page_size: int, quantized: bool) -> bool:
    """Whether two thread blocks have registers enough on a multiprocessor, with blocks of 64.

    That is 128 a thread. Large tiles take more, and so do widening a large head_dim, and the
    numbers of many pages beside it.
    """
    if not quantized or head_dim <= 64:
        return rows <= 16
    return head_dim <= 128 and rows <= (16 if page_size >= 16 else 8)


def default_config(
    *,
    rows: int,
    head_dim: int,
    page_size: int,
    num_sms: int = 132,
    split: int | None = None,
    quantized: bool = False,
) -> Config:
    """Chooses as many stages as fit, for two thread blocks per multiprocessor where they do.

    Two blocks hide each other's waits: a block of 64 tokens passes through two dependent matrix
    products.

    Args:
        rows: of a query tile, from `packed_rows`.
        head_dim: elements per head.
        page_size: P, tokens.
        num_sms: multiprocessors of the device.
        split: as in `Config`.
        quantized: whether pages are.

    Returns:
        The config.
    """
    two = may_share(rows=rows, head_dim=head_dim, page_size=page_size, quantized=quantized)
    for per_sm in (2, 1) if two else (1,):
        for stages in (4, 3, 2):
            config = Config(block_kv=64, stages=stages, num_cores=per_sm * num_sms, split=split)
            if fits(config, per_sm, rows, head_dim, quantized=quantized):
                return config
    raise NotImplementedError(
        f"{rows=} of {head_dim=} exceed the shared memory of a multiprocessor"
    )
