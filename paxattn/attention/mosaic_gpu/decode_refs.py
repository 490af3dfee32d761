"""What the decode kernel is built for, and what it has in memory; letters as in `decode_kernel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from paxattn.attention.mosaic_gpu.config import Config

QUERY_TILES = 2


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What is static about one compiled kernel.

    Attributes:
        rows: Q.
        head_dim: D.
        page_size: P.
        num_pages: N.
        max_pages: entries of a row's block table.
        group: query heads per KV head.
        single: whether no row has more than one new token.
        causal: whether a query is blind to later positions.
        soft_cap: on scaled scores, or None.
        dtype: of products' operands: queries, and pages or what their numbers are widened to.
        config: block sizes.
        page_dtype: of quantised pages, or None.
        interpret: for the interpreter, which takes no operand from registers.
    """

    rows: int
    head_dim: int
    page_size: int
    num_pages: int
    max_pages: int
    group: int
    single: bool
    causal: bool
    soft_cap: float | None
    dtype: Any
    config: Config
    page_dtype: Any = None
    interpret: bool = False

    @property
    def lazy(self) -> bool:
        """Whether sums stay per thread until an item's end: cheaper, but takes B x Q numbers."""
        return self.rows <= 16

    @property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """(First column, size) of the parts of V that are multiplied at a time.

        The tensor cores compute multiples of 64 rows of O^T: where D is none, two parts overlap.
        Large tiles have not the registers for the product of all columns beside its sum.
        """
        if self.head_dim % 64 == 0 and self.rows <= 16:
            return ((0, self.head_dim),)
        return tuple((column, 64) for column in self.columns)

    @property
    def columns(self) -> tuple[int, ...]:
        """First columns of parts of 64 that cover V."""
        return tuple(sorted({*range(0, self.head_dim - 63, 64), self.head_dim - 64}))

    @property
    def pages(self) -> int:
        """Pages per block: 1 where a page holds several blocks."""
        return max(self.config.block_kv // self.page_size, 1)

    @property
    def staged(self) -> bool:
        """Whether widened K, too, passes through shared memory, not from registers."""
        return self.interpret or self.head_dim > 128

    @property
    def num_scales(self) -> int:
        """Scales of a token: of quantised pages two, of K and V."""
        return 0 if self.page_dtype is None else 2


class Inputs(NamedTuple):
    """In global memory."""

    q: Any  # [R, H, Q, D]
    k_pages: Any  # [L, N, H, P, D]
    v_pages: Any  # same
    block_tables: Any  # i32[R, M]
    items: Any  # i32[W, COLUMNS]
    core_items: Any  # i32[C + 1]
    numbers: Any  # i32[2]: layer, window
    scale: Any  # f32[1], of scores, log2(e) included
    k_scales: Any = None  # bf16[L, N, H, P], of quantised pages
    v_scales: Any = None  # same


class Outputs(NamedTuple):
    """In global memory."""

    o: Any  # [R, H, V, Q]
    lse: Any  # f32[R, H, Q]
    o_parts: Any  # f32[S, V, Q]
    lse_parts: Any  # f32[S, Q]


class Scratch(NamedTuple):
    """In shared memory, of one thread block."""

    q: Any  # [2, Q, D]
    k: Any  # [stages, B, D]
    v: Any  # [stages, B, V]
    p: Any  # [Q, B]
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any
    k_scales: Any = None  # bf16[stages, B], of quantised pages, like those that follow
    v_scales: Any = None  # same
    wide: Any = None  # [B, D]
