"""Block sizes of the ragged kernel, chosen from shapes alone, and what it serves.

Nothing here imports Pallas: the choice of an implementation asks for it on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from paxattn.quantized import SCALE_DTYPE

DTYPES = ("bfloat16", "float32")
HEAD_DIMS = (128, 256)  # or 64, in pairs of heads
QUANTIZED_PAGE_SIZES = (16, 32, 64, 128, 256)
MAX_GROUP = 32
LANES = 128  # a vector register is [8, 128] 32-bit numbers; smaller last axes are padded to 128
CHUNK = 128  # packed query rows that are worked on together
_PACKED_ROWS = 256  # of a tile of many queries: as many as keep the matrix unit busy
_FEW_PACKED_ROWS = 64  # up to here a tile's arithmetic hides behind the pages' way from HBM
_VMEM_BYTES = 12 * 2**20  # of the 16 MiB that the smallest generation gives a kernel by default


@dataclass(frozen=True, kw_only=True)
class Config:
    """How one launch of the kernel is cut.

    Attributes:
        block_q: query tokens of a tile.
        block_pages: pages per step, a power of two up to 128.
        block_heads: KV heads that are worked on together, a divisor of their number.
    """

    block_q: int
    block_pages: int
    block_heads: int


def short_q_len(max_q_len: int, group: int) -> int:
    """New tokens that a row may have to count as short: such rows get tiles of their own size.

    If a tile for all fits `_FEW_PACKED_ROWS`, all are short. In a mixed batch those are short that
    fit 16 packed rows: nearly all have one new token, and a tile for prefill would be mostly empty.

    Args:
        max_q_len: bound on the new tokens of a row.
        group: query heads per KV head.

    Returns:
        The bound, from 1 to `max_q_len`.
    """
    if max_q_len * group <= _FEW_PACKED_ROWS:
        return max_q_len
    return max(_PACKED_ROWS // 16 // group, 1)


def long_block_q(group: int) -> int:
    """Query tokens of a tile for rows that are not short."""
    return max(_PACKED_ROWS // group // 8, 1) * 8


def scales_lie_ready(num_scales: int, page_size: int) -> bool:
    """Whether XLA stores scales [L, N, `num_scales`, P] in that order on a TPU, as the kernel does.

    Where pages do not fill the lanes, or heads the rows of a register (there are small ones, too),
    it puts pages there.
    """
    return page_size % LANES == 0 and (num_scales in (2, 4) or num_scales % 8 == 0)


def fetched_scales(wanted: int, num_scales: int) -> int:
    """Scales that are fetched for a token, of `num_scales`, where `wanted` are: registers of 8."""
    if num_scales % 8 == 0 and wanted % 8 == 0:
        return wanted
    return 8 if num_scales % 8 == 0 and 8 % wanted == 0 else num_scales


def packed_rows(block_q: int, group: int) -> int:
    """Rows of a query tile: tokens x group, in whole registers of 8 or chunks; or 2 or 4 rows."""
    rows = block_q * group
    step = next((n for n in (2, 4) if rows <= n), 8 if rows <= CHUNK else CHUNK)
    return -(-rows // step) * step


def choose(
    *,
    block_q: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    page_dtype: str | None = None,
    scales_per_head: int = 1,
) -> Config:
    """Chooses the largest blocks that fit the vector memory: tokens first, then heads.

    A step costs some hundred cycles however little it moves, and 512 tokens hide that.

    Args:
        block_q: query tokens of a tile.
        group: query heads per KV head.
        num_kv_heads: Hkv.
        head_dim: D.
        page_size: P.
        dtype: of queries, and of pages that are not quantised.
        page_dtype: of quantised pages, or None.
        scales_per_head: of those, for a token: 2 of a pair of heads that lie side by side.

    Returns:
        The config.

    Raises:
        NotImplementedError: not even a page of one head fits.
    """
    rows = packed_rows(block_q, group)
    heads = [n for n in range(num_kv_heads, 0, -1) if num_kv_heads % n == 0]
    pages = 1
    while pages < LANES and 2 * pages * page_size <= 512:
        pages *= 2
    while pages:
        for block_heads in heads:
            config = Config(block_q=block_q, block_pages=pages, block_heads=block_heads)
            size = vmem_bytes(
                config,
                rows=rows,
                head_dim=head_dim,
                page_size=page_size,
                dtype=dtype,
                page_dtype=page_dtype,
                scales_per_head=scales_per_head,
            )
            if size <= _VMEM_BYTES:
                return config
        pages //= 2
    raise NotImplementedError(
        f"a page of {page_size=} tokens with {head_dim=} in {page_dtype or dtype} and {rows} "
        "queries exceed the vector memory"
    )


def vmem_bytes(
    config: Config,
    *,
    rows: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    page_dtype: str | None = None,
    scales_per_head: int = 1,
) -> int:
    """Bytes of vector memory that a launch's arrays take, about.

    Args:
        config: the config.
        rows: of a query tile, from `packed_rows`.
        head_dim: D.
        page_size: P.
        dtype: of queries, and of pages that are not quantised.
        page_dtype: of quantised pages, or None.
        scales_per_head: see `choose`.

    Returns:
        The sum over K and V, queries and results (each twice), accumulators and scores; and of
        quantised pages the scales, and a head's K and V as they are computed in.
    """
    itemsize, tokens = jnp.dtype(dtype).itemsize, config.block_pages * page_size
    block = tokens * head_dim
    kv = 2 * 2 * config.block_heads * block * jnp.dtype(page_dtype or dtype).itemsize
    if page_dtype is not None:
        rows_of_scales = -(-config.block_heads * scales_per_head // 8) * 8
        staged = config.block_pages * max(page_size, LANES)
        kv += 2 * rows_of_scales * (2 * staged * SCALE_DTYPE.itemsize + max(tokens, LANES) * 4)
        kv += 2 * block * itemsize
    queries = 2 * config.block_heads * rows * head_dim * (itemsize + 4)
    accumulators = config.block_heads * rows * (head_dim + 2 * LANES) * 4
    scores = 3 * min(rows, CHUNK) * (-(-tokens // LANES) * LANES) * 4
    return kv + queries + accumulators + scores
