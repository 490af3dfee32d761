"""The body of the portable prefill kernel: tiles of 32 or 64 query rows, on one warpgroup.

Tiles, their order and the way over their blocks of KV are those of the kernel for Hopper
(`prefill_tiles`, `prefill_work`), with smaller tiles. Blocks that every query of a tile sees whole
are walked first, by a loop without masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
from jax import lax

from paxattn.attention.mosaic_gpu.portable import fold
from paxattn.attention.mosaic_gpu.portable.ring import Job, Pools, Ring, Tile
from paxattn.attention.mosaic_gpu.prefill_work import (
    Refs,
    Static,
    item_at,
    num_items,
    queries_at,
    walk_of,
)


def tile(s: Static, rows: int, *, max_pages: int, tma: bool) -> Tile:
    """What the kernel is compiled for, as `fold` and `ring` want it.

    Args:
        s: static.
        rows: packed query rows of a tile.
        max_pages: entries of a row's block table.
        tma: whether the card has TMA.
    """
    return Tile(
        rows=rows, max_pages=max_pages, tma=tma,
        group=s.group, head_dim=s.head_dim, page_size=s.page_size, num_pages=s.num_pages,
        dtype=s.dtype, causal=s.causal, window=s.window, soft_cap=s.soft_cap,
        block_kv=s.config.block_kv, stages=s.config.stages, interpret=s.interpret,
        page_dtype=s.page_dtype,
    )  # fmt: skip


def kernel(s: Static, t: Tile) -> Callable[..., None]:
    """Makes the kernel: a function of references to global memory and, by name, of a `Ring`."""

    def portable_prefill(*given: Any, ring: Ring) -> None:
        refs = Refs.of(lax.axis_index("cta"), *given)
        numbers = refs.numbers
        pools = Pools(
            refs.k_pages, refs.v_pages, refs.block_tables, numbers[2], numbers[3], refs.scale[0],
            refs.k_scales, refs.v_scales,
        )  # fmt: skip

        @pl.loop(0, num_items(s, refs))
        def _(nth: jax.Array) -> None:
            item = item_at(s, refs, nth)
            mine = item.head, item.tile.place
            job = Job(
                row=item.tile.row,
                head=item.head,
                stored=item.tile.stored,
                history=item.tile.history,
                first_packed=item.tile.first_packed,
                walk=walk_of(s, item.tile, pools.window),
            )
            sums = fold.attend(t, pools, ring, job, refs.q.at[queries_at(refs, item)])
            fold.write(t, refs.o.at[mine], refs.lse.at[mine], *sums)

    return portable_prefill
