"""The chain of blocks that the kernel walks along, and the copies that run ahead of it.

Letters as in `kernel`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.attention.mosaic_tpu.config import LANES
from paxattn.attention.mosaic_tpu.refs import Scalars, Scratch, Shape


class Step(NamedTuple):
    """A block of the chain: i32 scalars. `tile` is beyond the last where the chain has ended."""

    tile: Any
    head_block: Any
    block: Any


class Chain:
    """All blocks of all steps of the grid, in order."""

    def __init__(self, hbm: tuple, given: Scalars, scratch: Scratch, shape: Shape) -> None:
        self.given, self.scratch, self.shape = given, scratch, shape
        self.k_hbm, self.v_hbm, self.ids_hbm = hbm

    def first_block(self, tile: Any) -> Any:
        """Number of the first block of tokens that a tile reads."""
        return self.given.starts[tile] // self.shape.tokens

    def last_block(self, tile: Any) -> Any:
        """At least the first one: a tile that reads nothing has a block of no pages."""
        last = (self.given.stops[tile] - 1) // self.shape.tokens
        return jnp.maximum(last, self.first_block(tile))

    def after(self, at: Step) -> Step:
        """The chain's next block."""
        more = at.block < self.last_block(at.tile)
        turn = ~more & (at.head_block + 1 == self.shape.head_blocks)
        tile = at.tile + turn.astype(jnp.int32)
        head_block = jnp.where(turn, 0, at.head_block + (~more).astype(jnp.int32))
        known = jnp.minimum(tile, self.given.count[0] - 1)
        return Step(tile, head_block, jnp.where(more, at.block + 1, self.first_block(known)))

    def follow(self, at: Step, slot: Any) -> None:
        """Sends for the pages of a block, whose ids are on their way, and the ids of the next."""

        @pl.when(at.tile < self.given.count[0])
        def _() -> None:
            self.ids(at, slot).wait()
            self.pages(at, slot, start=True)
            after = self.after(at)

            @pl.when(after.tile < self.given.count[0])
            def _() -> None:
                self.ids(after, 1 - slot).start()

    def ids(self, at: Step, slot: Any) -> Any:
        """The copy of the piece of the block tables in which a block's page ids are."""
        piece = at.block * self.shape.config.block_pages // LANES
        return pltpu.make_async_copy(
            self.ids_hbm.at[self.given.rows[at.tile], piece],
            self.scratch.page_ids.at[slot],
            self.scratch.ids_arrived.at[slot],
        )

    def pages(self, at: Step, slot: Any, *, start: bool) -> None:
        """Starts the copies of a block's pages, or waits for them."""
        given, scratch, size = self.given, self.scratch, self.shape.page_size
        pages, heads = self.shape.config.block_pages, self.shape.config.block_heads
        begin = at.block * pages
        of_heads = pl.ds(at.head_block * heads, heads)

        def copy(page: Any, _: None) -> None:
            # (a wait only looks at sizes)
            page_id = scratch.page_ids[slot, 0, page % LANES] if start else 0
            tokens = pl.ds(pl.multiple_of((page - begin) * size, size), size)
            to = (slice(None), tokens) if self.shape.across else (tokens, slice(None))
            for hbm, vmem, arrived in (
                (self.k_hbm, scratch.k, scratch.k_arrived),
                (self.v_hbm, scratch.v, scratch.v_arrived),
            ):
                moved = pltpu.make_async_copy(
                    hbm.at[given.layer[0], page_id, of_heads],
                    vmem.at[slot, :, *to],
                    arrived.at[slot],
                )
                if start:
                    moved.start()
                else:
                    moved.wait()

        first = jnp.maximum(given.starts[at.tile] // size, begin)
        stop = jnp.minimum((given.stops[at.tile] + size - 1) // size, begin + pages)
        lax.fori_loop(first, stop, copy, None)
