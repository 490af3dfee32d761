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
from paxattn.attention.mosaic_tpu.refs import Pools, Scalars, Scratch, Shape


class Step(NamedTuple):
    """A block of the chain: i32 scalars. `tile` is beyond the last where the chain has ended."""

    tile: Any
    head_block: Any
    block: Any


class Chain:
    """All blocks of all steps of the grid, in order."""

    def __init__(self, hbm: Pools, given: Scalars, scratch: Scratch, shape: Shape) -> None:
        self.hbm, self.given, self.scratch, self.shape = hbm, given, scratch, shape

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

    def begin(self, at: Step) -> None:
        """Sends for the pages of the chain's first block."""
        self.scratch.piece[0] = 0
        self.ids(at, 0).start()
        self._send(at, 0, asked=True)

    def follow(self, at: Step, slot: Any) -> None:
        """Sends for the pages of the block after `at`, and the ids of those that follow it."""
        after = self.after(at)

        @pl.when(after.tile < self.given.count[0])
        def _() -> None:
            self._send(after, slot, asked=self._turns(at, after))

    def _send(self, at: Step, slot: Any, *, asked: Any) -> None:
        """Sends for a block's pages, whose ids are here, or on their way if they were `asked` for.

        Then for the ids of the next block, unless they are in the same piece.
        """
        held, after = self.scratch.piece[0], self.after(at)

        @pl.when(asked)
        def _() -> None:
            self.ids(at, held).wait()

        self.pages(at, slot, start=True)

        @pl.when((after.tile < self.given.count[0]) & self._turns(at, after))
        def _() -> None:
            self.ids(after, 1 - held).start()
            self.scratch.piece[0] = 1 - held

    def _turns(self, at: Step, after: Step) -> Any:
        """Whether the next block's page ids are in another piece of the block tables."""
        known = jnp.minimum(after.tile, self.given.count[0] - 1)
        moved = self.given.rows[known] != self.given.rows[at.tile]
        return moved | (self._piece(at) != self._piece(after))

    def _piece(self, at: Step) -> Any:
        return at.block * self.shape.config.block_pages // LANES

    def ids(self, at: Step, place: Any) -> Any:
        """The copy of the piece of the block tables in which a block's page ids are."""
        return pltpu.make_async_copy(
            self.hbm.page_ids.at[self.given.rows[at.tile], self._piece(at)],
            self.scratch.page_ids.at[place],
            self.scratch.ids_arrived.at[place],
        )

    def pages(self, at: Step, slot: Any, *, start: bool) -> None:
        """Starts the copies of a block's pages (and scales), or waits for them."""
        hbm, given, scratch, size = self.hbm, self.given, self.scratch, self.shape.page_size
        pages, heads = self.shape.config.block_pages, self.shape.config.block_heads
        begin, held = at.block * pages, scratch.piece[0]
        of_heads = pl.ds(at.head_block * heads, heads)

        def copy(page: Any, _: None) -> None:
            # (a wait only looks at sizes)
            page_id = scratch.page_ids[held, 0, page % LANES] if start else 0
            tokens = pl.ds(pl.multiple_of((page - begin) * size, size), size)
            here = given.layer[0], page_id, of_heads
            copies = [
                (hbm.k_pages.at[here], scratch.k.at[slot, :, tokens], scratch.k_arrived),
                (hbm.v_pages.at[here], scratch.v.at[slot, :, tokens], scratch.v_arrived),
            ]
            if self.shape.quantized:  # (a semaphore counts bytes, whatever they are)
                there = self._scales_of(page_id, at.head_block)
                to = slot, page - begin
                copies += [
                    (hbm.k_scales.at[there], scratch.k_scales.at[to], scratch.k_arrived),
                    (hbm.v_scales.at[there], scratch.v_scales.at[to], scratch.v_arrived),
                ]
                if start and size < self.shape.scale_lanes:
                    scratch.lanes[to] = page_id // hbm.k_scales.shape[1] * size
            for source, target, arrived in copies:
                moved = pltpu.make_async_copy(source, target, arrived.at[slot])
                if start:
                    moved.start()
                else:
                    moved.wait()

        first = jnp.maximum(given.starts[at.tile] // size, begin)
        stop = jnp.minimum((given.stops[at.tile] + size - 1) // size, begin + pages)
        lax.fori_loop(first, stop, copy, None)

    def _scales_of(self, page_id: Any, head_block: Any) -> tuple:
        """Where the scales of a page are, maybe in a line with those of others."""
        shape = self.shape
        layer = self.given.layer[0] if self.hbm.k_scales.shape[0] > 1 else 0
        line = page_id % self.hbm.k_scales.shape[1]
        if shape.fetched_scales == shape.num_scales:
            return layer, line
        first = head_block * shape.config.block_heads * shape.scales_per_head
        first = first // shape.fetched_scales * shape.fetched_scales
        return layer, line, pl.ds(pl.multiple_of(first, 8), shape.fetched_scales)
