"""The configs that the kernels can be built with, and the choice of one: tuned, or the heuristic's.

A candidate must compile without spilling registers and fit in shared memory in every variant of
its kernel (dtype, soft cap, window): a test compiles them all. Nothing here imports Mosaic GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from paxattn.attention import tuning
from paxattn.attention.mosaic_gpu import config as decode
from paxattn.attention.mosaic_gpu import prefill_config as prefill
from paxattn.attention.mosaic_gpu.portable import config as portable
from paxattn.attention.mosaic_gpu.portable.cards import Card


def decode_candidates(
    *, rows: int, head_dim: int, page_size: int, num_sms: int = 132, split: int | None = None,
    quantized: bool = False,
) -> Iterator[decode.Config]:  # fmt: skip
    """What the decode kernel for Hopper can be built with.

    Two thread blocks share a multiprocessor only with small blocks of small tiles: their registers
    end there (128 a thread; one of 64 tokens takes 95, one of 128 takes 152).

    Args:
        rows: of a query tile, from `config.packed_rows`.
        head_dim: elements per head.
        page_size: P, tokens.
        num_sms: multiprocessors of the device.
        split: as in `config.Config`.
        quantized: whether pages are.

    Yields:
        Configs of as many stages as fit.
    """
    two = decode.may_share(rows=rows, head_dim=head_dim, page_size=page_size, quantized=quantized)
    shapes = [(64, 1), *([(64, 2), (128, 1)] if two else [])]
    for (block_kv, per_sm), stages in itertools.product(shapes, range(2, 7)):
        config = decode.Config(
            block_kv=block_kv, stages=stages, num_cores=per_sm * num_sms, split=split
        )
        whole_pages = block_kv % page_size == 0 or page_size % block_kv == 0
        whole_splits = split is None or split % block_kv == 0
        fits = decode.fits(config, per_sm, rows, head_dim, quantized=quantized)
        if whole_pages and whole_splits and fits:
            yield config


def decode_name(card: Card | None) -> str:
    """What tables call the portable decode kernel, or with None that for Hopper."""
    return "mosaic_gpu.decode" if card is None else "mosaic_gpu.portable_decode"


def prefill_name(card: Card | None) -> str:
    """The same of the prefill kernels."""
    return "mosaic_gpu.prefill" if card is None else "mosaic_gpu.portable_prefill"


def decode_config(
    card: Card | None = None, *, device: str, dtype: str, rows: int, head_dim: int, page_size: int,
    num_sms: int = 132, split: int | None = None, page_dtype: str | None = None,
    max_q_len: int | None = None,
) -> decode.Config:  # fmt: skip
    """Chooses a decode kernel's config: the tuned one, else the heuristic's.

    Args:
        card: what the portable kernel runs on; None: it is the one for Hopper.
        device: the device's kind.
        dtype: of queries, and of pages that are not quantised.
        rows: of a query tile, from `config.packed_rows` or `portable.config.packed_rows`.
        head_dim: elements per head.
        page_size: P, tokens.
        num_sms: multiprocessors of a Hopper GPU.
        split: as in `config.Config`.
        page_dtype: of quantised pages, or None.
        max_q_len: as in `tuning.Question`.

    Returns:
        The config.
    """
    sizes: dict[str, Any] = dict(
        rows=rows, head_dim=head_dim, page_size=page_size, split=split,
        quantized=page_dtype is not None,
    )  # fmt: skip
    if card is None:
        default = decode.default_config(**sizes, num_sms=num_sms)
        candidates = list(decode_candidates(**sizes, num_sms=num_sms))
    else:
        candidates = portable.decode_configs(card, **sizes)
        default = candidates[0]
    return tuning.pick(
        decode_name(card),
        device=device,
        key=tuning.key_of(
            page_dtype, dtype=dtype, head_dim=head_dim, page_size=page_size, rows=rows
        ),
        default=default,
        candidates=candidates,
        max_q_len=max_q_len,
    )


def prefill_candidates(
    *, head_dim: int, page_size: int, num_sms: int = 132, quantized: bool = False
) -> Iterator[prefill.Config]:
    """What the prefill kernel for Hopper can be built with.

    Args:
        head_dim: elements per head.
        page_size: P, tokens.
        num_sms: multiprocessors of the device.
        quantized: whether pages are.

    Yields:
        Configs of as many stages as fit, of one only where two do not: with a thread block per
        multiprocessor, which deals the work evenly by itself, and with many, which the hardware
        deals.
    """
    blocks = (64,) if head_dim > 128 else (64, 128)
    for block_kv, stages, waves in itertools.product(blocks, range(1, 7), (1, 32)):
        config = prefill.Config(
            block_kv=block_kv, stages=stages, wide=2 if quantized else 0, num_ctas=waves * num_sms
        )
        few = stages == 1 and dataclasses.replace(config, stages=2).fits(head_dim)
        whole_pages = block_kv % page_size == 0 or page_size % block_kv == 0
        if whole_pages and config.fits(head_dim) and not few:
            yield config


def prefill_config(
    card: Card | None = None, *, device: str, dtype: str, head_dim: int, page_size: int,
    num_sms: int = 132, page_dtype: str | None = None,
) -> prefill.Config:  # fmt: skip
    """Chooses a prefill kernel's config: the tuned one, else the heuristic's.

    Args:
        card: what the portable kernel runs on; None: it is the one for Hopper.
        device: the device's kind.
        dtype: of queries, and of pages that are not quantised.
        head_dim: elements per head.
        page_size: P, tokens.
        num_sms: multiprocessors of a Hopper GPU.
        page_dtype: of quantised pages, or None.

    Returns:
        The config.
    """
    sizes: dict[str, Any] = dict(head_dim=head_dim, quantized=page_dtype is not None)
    if card is None:
        default = prefill.default_config(**sizes, num_sms=num_sms)
        candidates = list(prefill_candidates(**sizes, page_size=page_size, num_sms=num_sms))
    else:
        candidates = portable.prefill_configs(card, **sizes, page_size=page_size)
        default = candidates[0]
    return tuning.pick(
        prefill_name(card),
        device=device,
        key=tuning.key_of(page_dtype, dtype=dtype, head_dim=head_dim, page_size=page_size),
        default=default,
        candidates=candidates,
    )
