"""The configs that the kernels can be built with, and the choice of one: tuned, or the heuristic's.

A candidate must compile without spilling registers and fit in shared memory in every variant of
its kernel (dtype, soft cap, window): a test compiles them all. Nothing here imports Mosaic GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from paxattn.attention import tuning
from paxattn.attention.mosaic_gpu import config as decode
from paxattn.attention.mosaic_gpu import prefill_config as prefill
from paxattn.attention.mosaic_gpu.portable import config as portable
from paxattn.attention.mosaic_gpu.portable.cards import Card


def decode_candidates(
    *, rows: int, head_dim: int, page_size: int, num_sms: int = 132, split: int | None = None
) -> Iterator[decode.Config]:
    """What the decode kernel can be built with.

    Two thread blocks share a multiprocessor only with small blocks of small tiles: their registers
    end there (128 a thread; one of 64 tokens takes 95, one of 128 takes 152).

    Args:
        rows: of a query tile, from `config.packed_rows`.
        head_dim: elements per head.
        page_size: P, tokens.
        num_sms: multiprocessors of the device.
        split: as in `config.Config`.

    Yields:
        Configs of as many stages as fit.
    """
    small = rows <= 16
    shapes = [(64, 1), *([(64, 2), (128, 1)] if small else [])]
    for (block_kv, per_sm), stages in itertools.product(shapes, range(2, 7)):
        config = decode.Config(
            block_kv=block_kv, stages=stages, num_cores=per_sm * num_sms, split=split
        )
        whole_pages = block_kv % page_size == 0 or page_size % block_kv == 0
        whole_splits = split is None or split % block_kv == 0
        if whole_pages and whole_splits and decode.fits(config, per_sm, rows, head_dim):
            yield config


def decode_config(
    *, device: str, dtype: str, rows: int, head_dim: int, page_size: int, num_sms: int = 132,
    split: int | None = None, quantized: bool = False,
) -> decode.Config:  # fmt: skip
    """Chooses the decode kernel's config: the tuned one, else the heuristic's.

    With quantised pages always the latter: nothing was tuned with them yet.

    Args:
        device: the device's kind.
        dtype: of queries and pages.
        rows: of a query tile, from `config.packed_rows`.
        head_dim: elements per head.
        page_size: P, tokens.
        num_sms: multiprocessors of the device.
        split: as in `config.Config`.
        quantized: whether pages are.

    Returns:
        The config.
    """
    default = decode.default_config(
        rows=rows, head_dim=head_dim, num_sms=num_sms, split=split, quantized=quantized
    )
    if quantized:
        return default
    return tuning.pick(
        "mosaic_gpu.decode",
        device=device,
        key={"dtype": dtype, "head_dim": head_dim, "page_size": page_size, "rows": rows},
        default=default,
        candidates=decode_candidates(
            rows=rows, head_dim=head_dim, page_size=page_size, num_sms=num_sms, split=split
        ),
    )


def prefill_candidates(
    *, head_dim: int, page_size: int, num_sms: int = 132
) -> Iterator[prefill.Config]:
    """What the prefill kernel can be built with.

    Args:
        head_dim: elements per head.
        page_size: P, tokens.
        num_sms: multiprocessors of the device.

    Yields:
        Configs of as many stages as fit: with a thread block per multiprocessor, which deals the
        work evenly by itself, and with many, which the hardware deals.
    """
    blocks = (64,) if head_dim > 128 else (64, 128)
    for block_kv, stages, waves in itertools.product(blocks, range(2, 7), (1, 32)):
        config = prefill.Config(block_kv=block_kv, stages=stages, num_ctas=waves * num_sms)
        if (block_kv % page_size == 0 or page_size % block_kv == 0) and config.fits(head_dim):
            yield config


def prefill_config(
    *, device: str, dtype: str, head_dim: int, page_size: int, num_sms: int = 132,
    quantized: bool = False,
) -> prefill.Config:  # fmt: skip
    """Chooses the prefill kernel's config: the tuned one, else the heuristic's.

    With quantised pages always the latter, as with the decode kernel.

    Args:
        device: the device's kind.
        dtype: of queries and pages.
        head_dim: elements per head.
        page_size: P, tokens.
        num_sms: multiprocessors of the device.
        quantized: whether pages are.

    Returns:
        The config.
    """
    default = prefill.default_config(head_dim=head_dim, num_sms=num_sms, quantized=quantized)
    if quantized:
        return default
    return tuning.pick(
        "mosaic_gpu.prefill",
        device=device,
        key={"dtype": dtype, "head_dim": head_dim, "page_size": page_size},
        default=default,
        candidates=prefill_candidates(head_dim=head_dim, page_size=page_size, num_sms=num_sms),
    )


def portable_decode_config(
    card: Card, *, device: str, dtype: str, rows: int, head_dim: int, page_size: int,
    split: int | None = None, quantized: bool = False,
) -> decode.Config:  # fmt: skip
    """As `decode_config`, for the portable kernel.

    Args:
        card: the GPU.
        device: its kind.
        dtype: of queries and pages.
        rows: of a query tile, from `portable.config.packed_rows`.
        head_dim: elements per head.
        page_size: P, tokens.
        split: as in `config.Config`.
        quantized: whether pages are.

    Returns:
        The config.
    """
    candidates = portable.decode_configs(
        card, rows=rows, head_dim=head_dim, page_size=page_size, split=split, quantized=quantized
    )
    if quantized:
        return candidates[0]
    return tuning.pick(
        "mosaic_gpu.portable_decode",
        device=device,
        key={"dtype": dtype, "head_dim": head_dim, "page_size": page_size, "rows": rows},
        default=candidates[0],
        candidates=candidates,
    )


def portable_prefill_config(
    card: Card, *, device: str, dtype: str, head_dim: int, page_size: int, quantized: bool = False
) -> prefill.Config:
    """As `prefill_config`, for the portable kernel.

    Args:
        card: the GPU.
        device: its kind.
        dtype: of queries and pages.
        head_dim: elements per head.
        page_size: P, tokens.
        quantized: whether pages are.

    Returns:
        The config.
    """
    candidates = portable.prefill_configs(
        card, head_dim=head_dim, page_size=page_size, quantized=quantized
    )
    if quantized:
        return candidates[0]
    return tuning.pick(
        "mosaic_gpu.portable_prefill",
        device=device,
        key={"dtype": dtype, "head_dim": head_dim, "page_size": page_size},
        default=candidates[0],
        candidates=candidates,
    )
