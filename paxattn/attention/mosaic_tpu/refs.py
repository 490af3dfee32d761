"""What the parts of the kernel share: static facts, scalars, and memory of its own.

Letters as in `kernel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from paxattn.attention.mosaic_tpu.config import (
    CHUNK,
    LANES,
    Config,
    fetched_scales,
    packed_rows,
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is static about a launch.

    Attributes:
        config: block sizes.
        group: G.
        num_kv_heads: H.
        head_dim: D.
        page_size: P.
        causal: whether a query is blind to later positions.
        window: whether there may be a sliding window.
        soft_cap: on scaled scores, or None.
        dtype: of queries, and what pages are computed in.
        page_dtype: of pages: `dtype`, or that of quantised ones, which have scales.
        out_dtype: of the result.
        scales_per_head: of quantised pages, for a token: 2 where a "head" is a pair of them, side
            by side in D; the first half of each group of queries is for the first.
    """

    config: Config
    group: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    causal: bool
    window: bool
    soft_cap: float | None
    dtype: Any
    page_dtype: Any
    out_dtype: Any
    scales_per_head: int = 1

    @property
    def rows(self) -> int:
        """Q."""
        return packed_rows(self.config.block_q, self.group)

    @property
    def chunk(self) -> int:
        """Packed query rows that are worked on together."""
        return min(self.rows, CHUNK)

    @property
    def tokens(self) -> int:
        """K."""
        return self.config.block_pages * self.page_size

    @property
    def quantized(self) -> bool:
        """Whether pages have scales."""
        return self.page_dtype != self.dtype

    @property
    def num_scales(self) -> int:
        """Scales of a token, of all heads."""
        return self.num_kv_heads * self.scales_per_head

    @property
    def fetched_scales(self) -> int:
        """Those of them that are fetched: the s of `kernel`."""
        return fetched_scales(self.config.block_heads * self.scales_per_head, self.num_scales)

    @property
    def scale_lanes(self) -> int:
        """Lanes that a page's scales come in: the S of `kernel`."""
        return max(self.page_size, LANES)

    @property
    def head_blocks(self) -> int:
        """H / h."""
        return self.num_kv_heads // self.config.block_heads


class Scalars(NamedTuple):
    """What lies in scalar memory: `Tiles`' arrays, then i32[1] and f32[1]."""

    rows: Any
    lens: Any
    positions: Any
    starts: Any
    stops: Any
    count: Any
    layer: Any
    window: Any
    sm_scale: Any


class Pools(NamedTuple):
    """What stays in HBM: see `kernel.launch`; scales of quantised pages only."""

    k_pages: Any
    v_pages: Any
    page_ids: Any
    k_scales: Any = None
    v_scales: Any = None


class Scratch(NamedTuple):
    """Memory of the kernel's own.

    Attributes:
        k: [2, h, K, D], two blocks of keys: one computed, one on its way.
        v: same.
        page_ids: i32[2, 1, 128] in scalar memory: the piece of the block tables whose pages are
            sent for, and one on its way.
        piece: i32[1], which of the two was asked for last.
        acc: f32[h, Q, D], the result before it is divided by `total`.
        top: f32[h, Q, 128], the largest score so far, the same in all columns.
        total: f32[h, Q, 128], the sum of weights.
        number: i32[1], blocks of the chain computed so far.
        k_arrived: semaphores, one per block.
        v_arrived: same.
        ids_arrived: same.
        k_scales: bf16[2, K / P, s, S] as they come, of quantised pages only, like all that follow.
        v_scales: same.
        lanes: i32[2, 128] in scalar memory, where each page's begin, if they do not fill the lanes.
        scales: f32[2, s, K] (128 at least), of the keys and of the values of the block that is
            computed.
    """

    k: Any
    v: Any
    page_ids: Any
    piece: Any
    acc: Any
    top: Any
    total: Any
    number: Any
    k_arrived: Any
    v_arrived: Any
    ids_arrived: Any
    k_scales: Any = None
    v_scales: Any = None
    lanes: Any = None
    scales: Any = None
