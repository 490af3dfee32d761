"""How blocks of K and V come to shared memory: a ring that one warpgroup fills for itself.

Hopper and Blackwell copy by TMA, which reports to a barrier per stage, Ampere and Ada by
`cp.async`, which reports nothing: one waits until at most so many of the copies asked for last are
still under way.

Of quantised pages the ring holds the narrow numbers. Scales of a page and head are few (32 bytes of
16 tokens): too few for `cp.async`, which all 128 threads take part in with 4 bytes or more. They
are loaded into registers, where these reach a block ahead.

Letters: L layers, N pages, H KV heads, P `page_size`, D head_dim, B `block_kv`, R rows of the
batch, M entries of a row's block table.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from paxattn.attention.mosaic_gpu.common import barriers, copy_layout, load
from paxattn.attention.mosaic_gpu.portable.config import swizzle
from paxattn.attention.mosaic_gpu.prefill_work import Walk

plgpu: Any = mosaic_gpu  # (jax 0.10, which mypy may see, does not have all of it)
_i32 = jnp.int32


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What is static about one compiled kernel.

    Attributes:
        rows: Q, packed query rows: 16, 32 or 64.
        head_dim: D.
        page_size: P.
        num_pages: N.
        max_pages: M.
        group: query heads per KV head.
        causal: whether a query is blind to later positions.
        window: whether a sliding window is given.
        soft_cap: on scaled scores, or None.
        dtype: of queries, and of pages that are not quantised.
        block_kv: B, tokens per step.
        stages: blocks in the ring.
        tma: whether copies are TMA's, else `cp.async`.
        interpret: whether Pallas' interpreter runs this.
        page_dtype: of quantised pages, or None.
    """

    rows: int
    head_dim: int
    page_size: int
    num_pages: int
    max_pages: int
    group: int
    causal: bool
    window: bool
    soft_cap: float | None
    dtype: Any
    block_kv: int
    stages: int
    tma: bool
    interpret: bool
    page_dtype: Any = None

    @property
    def warps(self) -> int:
        """How many of the four warps lie along the rows of a tile; the others along its columns."""
        return self.rows // 16

    @property
    def lazy(self) -> bool:
        """Whether sums stay per thread to the end of a job: rows here cross all four warps."""
        return self.rows == 16

    @property
    def copy(self) -> int:
        """Tokens per copy: a page, or the part of one that fits a block."""
        return min(self.page_size, self.block_kv)

    @property
    def copies(self) -> int:
        """Copies of K per block, and of V."""
        return self.block_kv // self.copy

    @property
    def columns(self) -> int:
        """Columns of a head that are read from shared memory at a time: registers end there.

        (With 64 rows each warp holds all of an operand's part; with fewer, warps share it.)
        """
        sizes = (32, 16) if self.rows == 64 else (64, 32, 16)
        return next(size for size in sizes if self.head_dim % size == 0)

    @property
    def swizzle(self) -> int:
        """Bytes over which 16-bit columns are swizzled (tiles are 8 rows by that)."""
        by_warps = not self.tma or self.page_dtype is not None
        return swizzle(self.copy, self.head_dim, by_warps=by_warps, most=2 * self.columns)

    @property
    def widening(self) -> Any:
        """The layout in which pages are widened, all warps at one."""
        return copy_layout(self.copy, self.head_dim, self.swizzle)

    @property
    def scales_ahead(self) -> bool:
        """Whether scales are loaded a block before they are needed: as far as registers reach."""
        return self.rows < 64

    @property
    def keeps_queries(self) -> bool:
        """Whether queries stay in registers, or there is no room and each block loads them."""
        return self.rows == 16 or self.head_dim <= 128


class Pools(NamedTuple):
    """References to global memory, and scalars that are the same for all jobs."""

    k_pages: Any  # [L, N, H, P, D]
    v_pages: Any  # same
    block_tables: Any  # i32[R, M]
    layer: jax.Array
    window: jax.Array  # positive
    scale: jax.Array  # of scores, log2(e) included unless there is a soft cap
    k_scales: Any = None  # bf16[L, N, H, P], of quantised pages
    v_scales: Any = None  # same


class Ring(NamedTuple):
    """In shared memory. Without TMA there are no barriers."""

    k: Any  # [stages, B, D]
    v: Any  # same
    p: Any  # [Q, B], on its way from one product to the next
    k_there: Any = None
    v_there: Any = None
    wide: Any = None  # [B, D], of quantised pages: the block of K or V that is worked with


def scratch(t: Tile) -> Ring:
    """The fields of `Ring`, as types."""

    def matrix(*shape: int, size: int, dtype: Any = t.dtype) -> Any:
        transforms = [plgpu.TilingTransform((8, size // jnp.dtype(dtype).itemsize))]
        if size > 16:  # (rows of a tile that are not a single read)
            transforms.append(plgpu.SwizzleTransform(size))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    p = matrix(t.rows, t.block_kv, size=128 if t.block_kv % 64 == 0 else 64)
    there = barriers(t.stages, arrivals=t.copies) if t.tma else None
    ring, wide = matrix(t.stages, t.block_kv, t.head_dim, size=t.swizzle), None
    if t.page_dtype is not None:  # (tiles of as many columns)
        ring = matrix(t.stages, t.block_kv, t.head_dim, size=t.swizzle // 2, dtype=t.page_dtype)
        wide = matrix(t.block_kv, t.head_dim, size=t.swizzle)
    return Ring(ring, ring, p, there, there, wide)


class Job(NamedTuple):
    """What is attended to: scalars.

    Attributes:
        row: of the batch.
        head: KV head.
        stored: tokens of the row that can be read.
        history: position of the row's first new token.
        first_packed: number of the tile's first packed query row within the row.
        walk: the blocks of KV.
    """

    row: jax.Array
    head: jax.Array
    stored: jax.Array
    history: jax.Array
    first_packed: jax.Array
    walk: Walk


def page_numbers(t: Tile, pools: Pools, job: Job, step: jax.Array) -> tuple[jax.Array, ...]:
    """The pages of the block of a step; past the row's last page that page again."""
    last = lax.div(jnp.maximum(job.stored, 1) - 1, _i32(t.page_size))
    first = lax.div(job.walk.start + job.walk.block(step) * t.block_kv, _i32(t.page_size))
    last = jnp.minimum(last, t.max_pages - 1)
    return tuple(pools.block_tables[job.row, jnp.minimum(first + i, last)] for i in range(t.copies))


def page_scales(t: Tile, pools: Pools, job: Job, step: jax.Array) -> tuple[jax.Array, ...]:
    """Of quantised pages the scales of a step's block: a vector per page of K, then those of V."""
    if t.page_dtype is None:
        return ()
    rows, numbers = _rows_of_pages(t, job, step), page_numbers(t, pools, job, step)
    return tuple(
        load(scales.at[pools.layer, _clipped(t, number), job.head, rows], t.widening.reduce(1))
        for scales in (pools.k_scales, pools.v_scales)
        for number in numbers
    )


def _clipped(t: Tile, number: jax.Array) -> jax.Array:
    return jnp.clip(number, 0, t.num_pages - 1)


def _rows_of_pages(t: Tile, job: Job, step: jax.Array) -> Any:
    """Which tokens of its pages are in the block of a step."""
    first = job.walk.start + job.walk.block(step) * t.block_kv
    part = lax.rem(lax.div(first, _i32(t.copy)), _i32(t.page_size // t.copy))
    return pl.ds(0 if t.copy == t.page_size else part * t.copy, t.copy)


def _copy(t: Tile, source: Any, target: Any, there: Any) -> None:
    if t.tma:
        plgpu.copy_gmem_to_smem(source, target, there)
    elif t.interpret:
        target[...] = source[...]
    else:
        plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def fetch(
    t: Tile, pools: Pools, ring: Ring, job: Job, step: jax.Array, numbers: tuple[jax.Array, ...]
) -> None:
    """Asks for the block of a step, if there is such a step.

    To be called when this warp has read the block that has the place; every copy is preceded by a
    barrier among warps. What they did there must be done for TMA as well, which is another proxy.
    """

    def copies() -> None:
        if t.tma:
            plgpu.commit_smem()
        slot, size, rows = lax.rem(step, _i32(t.stages)), t.copy, _rows_of_pages(t, job, step)
        for pages, place, there in (
            (pools.k_pages, ring.k, ring.k_there),
            (pools.v_pages, ring.v, ring.v_there),
        ):
            for i, number in enumerate(numbers):
                source = pages.at[pools.layer, _clipped(t, number), job.head]
                if size < t.page_size:
                    source = source.at[rows]
                target = place.at[slot, pl.ds(i * size, size)]
                _copy(t, source, target, there.at[slot] if t.tma else None)

    pl.when(step < job.walk.blocks)(copies)


def fetch_first(t: Tile, pools: Pools, ring: Ring, job: Job) -> tuple[jax.Array, ...]:
    """Asks for as many blocks as there are stages, less one; gives the next one's page numbers."""
    for step in range(t.stages - 1):
        at = _i32(step)
        fetch(t, pools, ring, job, at, page_numbers(t, pools, job, at))
    return page_numbers(t, pools, job, _i32(t.stages - 1))


def _await(t: Tile, there: Any, step: jax.Array, blocks: jax.Array, later: int, own: int) -> None:
    """Waits for copies of a step's block, of which `own` others may still be under way.

    `later` blocks were asked for since, unless there are no more: then all must have come.
    """
    if t.tma:
        plgpu.barrier_wait(there.at[lax.rem(step, _i32(t.stages))])
    elif not t.interpret:
        wait = functools.partial(plgpu.wait_gmem_to_smem, later * 2 * t.copies + own)
        pl.when(step + later < blocks)(wait)
        pl.when(step + later >= blocks)(functools.partial(plgpu.wait_gmem_to_smem, 0))


def await_keys(t: Tile, ring: Ring, step: jax.Array, blocks: jax.Array) -> None:
    """Waits for a step's K, while that of the step `stages - 1` later is not yet asked for."""
    _await(t, ring.k_there, step, blocks, t.stages - 2, t.copies)


def await_values(t: Tile, ring: Ring, step: jax.Array, blocks: jax.Array) -> None:
    """Waits for a step's V, when that has been."""
    _await(t, ring.v_there, step, blocks, t.stages - 1, 0)
