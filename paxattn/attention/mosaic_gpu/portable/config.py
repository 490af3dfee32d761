"""Block sizes of the portable kernels, and what these can serve.

Configs are of the same kinds as those of the kernels for Hopper. Nothing here imports Mosaic GPU:
the choice of an implementation asks for it on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paxattn.attention.checks import Request
from paxattn.attention.mosaic_gpu import prefill_config
from paxattn.attention.mosaic_gpu.config import Config
from paxattn.attention.mosaic_gpu.portable.cards import Card

_SYSTEM_BYTES = 1024  # that each thread block takes of its multiprocessor's shared memory
_RESERVED_BYTES = 2 * 1024  # per thread block: barriers, the reductions' scratch, alignment
_MOST_STAGES = 4


def max_rows(head_dim: int) -> int:
    """Packed query rows of the prefill kernel's tiles, and the most of the decode kernel's.

    Registers end there.
    """
    return 64 if head_dim <= 128 else 32


def packed_rows(max_q_len: int, group: int, head_dim: int) -> int:
    """Rows of a decode tile: 16 for each of one, two or four warps side by side.

    The four warps of a thread block share a tile: `w` of them its rows, the others its columns.
    With one, the columns of a value must be a multiple of 32.

    Args:
        max_q_len: bound on a row's new tokens.
        group: query heads per KV head.
        head_dim: elements per head.

    Returns:
        16, 32 or 64.
    """
    needed = max(max_q_len * group, 16 if head_dim % 32 == 0 else 32)
    return next(rows for rows in (16, 32, 64) if needed <= rows)


def shared_bytes(
    *, block_kv: int, stages: int, rows: int, head_dim: int, quantized: bool = False
) -> int:
    """Bytes of shared memory of a thread block's arrays.

    That is rings of K and V, and probabilities; with quantised pages a block that is widened, too.
    """
    block = block_kv * head_dim
    ring = 2 * stages * block
    return (ring + 2 * block if quantized else 2 * ring) + 2 * rows * block_kv


def fits(card: Card, per_sm: int, **sizes: Any) -> bool:
    """Whether `per_sm` thread blocks have shared memory enough on a multiprocessor of a card."""
    needed = shared_bytes(**sizes)
    return needed + _RESERVED_BYTES + _SYSTEM_BYTES <= card.shared_bytes // per_sm


def _shapes(
    card: Card, *, rows: int, head_dim: int, page_size: int, quantized: bool
) -> Iterator[tuple[int, int, int]]:
    """(Thread blocks per multiprocessor, `block_kv`, stages) that fit, the best guess first.

    Two thread blocks hide each other's waits, so they come before large blocks, and those before
    more stages; four stages leave little to wait for. The largest tiles have registers enough for
    blocks of 32 only, the sooner if scales take some.
    """
    blocks = (32,) if rows * head_dim > (64 * 80 if quantized else 64 * 96) else (64, 32)
    for per_sm in (2, 1):
        for block_kv in blocks:
            if block_kv % page_size and page_size % block_kv:
                continue
            for stages in range(_MOST_STAGES, 1, -1):
                sizes = dict(rows=rows, head_dim=head_dim, quantized=quantized)
                if fits(card, per_sm, block_kv=block_kv, stages=stages, **sizes):
                    yield per_sm, block_kv, stages


def decode_configs(
    card: Card, *, rows: int, head_dim: int, page_size: int, split: int | None = None,
    quantized: bool = False,
) -> list[Config]:  # fmt: skip
    """What the decode kernel can be built with, the heuristic's choice first.

    Args:
        card: the GPU.
        rows: of a tile, from `packed_rows`.
        head_dim: elements per head.
        page_size: P, tokens.
        split: as in `mosaic_gpu.config.Config`.
        quantized: whether pages are.

    Returns:
        The configs.
    """
    return [
        Config(block_kv=block_kv, stages=stages, num_cores=per_sm * card.num_sms, split=split)
        for per_sm, block_kv, stages in _shapes(
            card, rows=rows, head_dim=head_dim, page_size=page_size, quantized=quantized
        )
        if split is None or split % block_kv == 0
    ]


def prefill_configs(
    card: Card, *, head_dim: int, page_size: int, quantized: bool = False
) -> list[prefill_config.Config]:
    """What the prefill kernel can be built with, the heuristic's choice first.

    Args:
        card: the GPU.
        head_dim: elements per head.
        page_size: P, tokens.
        quantized: whether pages are.

    Returns:
        The configs.
    """
    sizes = dict(rows=max_rows(head_dim), head_dim=head_dim, page_size=page_size)
    return [
        prefill_config.Config(block_kv=block_kv, stages=stages, num_ctas=per_sm * card.num_sms)
        for per_sm, block_kv, stages in _shapes(card, **sizes, quantized=quantized)
    ]


def swizzle(rows: int, columns: int, *, by_warps: bool, most: int = 128) -> int:
    """The widest swizzle that a copy of `rows` by `columns` 16-bit numbers can have.

    Shared memory holds matrices in tiles of 8 rows by a swizzle; `cp.async`, and who widens
    quantised pages, shares the tiles of a page out to four warps: along one axis, or along both.

    Args:
        rows: a multiple of 8.
        columns: a multiple of 16.
        by_warps: whether warps share; TMA takes any.
        most: bytes.

    Returns:
        128, 64 or 32, in bytes.

    Raises:
        NotImplementedError: there is none.
    """
    down = rows // 8
    for size in (128, 64, 32):
        tiles, rest = divmod(2 * columns, size)
        if size > most or rest:
            continue
        if not by_warps or down % 4 == 0 or (down % 2 == tiles % 2 == 0) or tiles % 4 == 0:
            return size
    raise NotImplementedError(
        f"page_size={rows} with head_dim={columns}: tiles of 8 by 16 numbers of a page, shared out "
        "to four warps (by cp.async, or to widen quantised pages), do not come out even: page "
        "sizes from 32 on serve"
    )


def check(request: Request, card: Card) -> None:
    """Checks what the portable kernels refuse beyond the others.

    Args:
        request: what is asked.
        card: the GPU.

    Raises:
        NotImplementedError: they cannot serve; the message says why.
    """
    quantized = request.page_dtype is not None
    if request.page_dtype == "float8_e4m3fn" and not card.fp8:
        raise NotImplementedError(
            f"{card.arch} has no instruction that converts fp8 numbers (Ada, sm_89, has): keep "
            "pages in int8"
        )
    swizzle(min(request.page_size, 32), request.head_dim, by_warps=quantized or not card.tma)
