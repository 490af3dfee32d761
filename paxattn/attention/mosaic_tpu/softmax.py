"""The arithmetic of the kernel: online softmax over one block of keys and values after another.

Letters as in `kernel`.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.attention.mosaic_tpu.chain import Step
from paxattn.attention.mosaic_tpu.config import LANES
from paxattn.attention.mosaic_tpu.refs import Scalars, Scratch, Shape

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
HIDDEN = -2e38  # a score that is not seen
NOTHING = -1e38  # the least maximum: above it, so that what is hidden weighs exp2(-inf) = 0


class Softmax:
    """What a tile's queries have seen so far, in one block of heads."""

    def __init__(self, given: Scalars, scratch: Scratch, shape: Shape) -> None:
        self.given, self.scratch, self.shape = given, scratch, shape

    def begin(self) -> None:
        """Nothing yet."""
        self.scratch.acc[...] = jnp.zeros_like(self.scratch.acc)
        self.scratch.total[...] = jnp.zeros_like(self.scratch.total)
        self.scratch.top[...] = jnp.full_like(self.scratch.top, NOTHING)

    def place_scales(self, slot: Any) -> None:
        """Lays the scales of a block's pages side by side, f32: their rows can be taken alone."""
        scratch, shape = self.scratch, self.shape
        if not shape.quantized:
            return
        size, width = shape.page_size, shape.scale_lanes
        lane = lax.broadcasted_iota(jnp.int32, (shape.fetched_scales, width), 1)
        for page, (i, pool) in itertools.product(
            range(shape.config.block_pages), enumerate((scratch.k_scales, scratch.v_scales))
        ):
            first = page * size % width
            place = i, slice(None), pl.ds(page * size - first, width)
            scales = pool[slot, page].astype(jnp.float32)
            if size < width:  # it came with other pages: take its own, to where they belong
                turn = (first - scratch.lanes[slot, page]) % width
                mine = (lane >= first) & (lane < first + size)
                scales = jnp.where(mine, pltpu.roll(scales, turn, 1), scratch.scales[place])
            scratch.scales[place] = scales

    def clear_tail(self, at: Step, slot: Any) -> None:
        """Zeroes the values that no query sees: a weight of 0 times what lies there may be NaN."""
        given, values = self.given, self.scratch.v
        first = at.block * self.shape.tokens
        start, stop = given.starts[at.tile], given.stops[at.tile]

        @pl.when((first < start) | (first + self.shape.tokens > stop))
        def _() -> None:
            token = first + lax.broadcasted_iota(jnp.int32, values.shape[2:], 0)
            read = (token >= start) & (token < stop)

            def one_head(head: Any, _: None) -> None:
                kept = jnp.where(read, values[slot, head].astype(jnp.float32), 0.0)
                values[slot, head] = kept.astype(values.dtype)

            self._each_head(one_head)

    def _seen(self, at: Step, first_row: Any) -> Any:
        """Which of a chunk's queries see which token of a block: bool[chunk, K]."""
        given, shape = self.given, self.shape
        rows = first_row + lax.broadcasted_iota(jnp.int32, (shape.chunk, 1), 0)
        position = given.positions[at.tile] + rows // shape.group
        token = lax.broadcasted_iota(jnp.int32, (1, shape.tokens), 1) + at.block * shape.tokens
        seen = token < given.stops[at.tile]
        if shape.causal:
            seen &= token <= position
        if shape.window:
            window = given.window[0]
            seen &= token > position - jnp.where(window > 0, window, 2**30)
        return jnp.broadcast_to(seen, (shape.chunk, shape.tokens))

    def attend(self, at: Step, slot: Any, q_ref: Any) -> None:
        """Adds a block of keys and values to the result of all heads, chunk after chunk."""
        scratch, shape = self.scratch, self.shape

        def one_chunk(chunk: Any, _: None) -> None:
            first_row = pl.multiple_of(chunk * shape.chunk, shape.chunk)
            rows = pl.ds(first_row, shape.chunk)
            seen = self._seen(at, first_row)

            def one_head(head: Any, _: None) -> None:
                keys = scratch.k[slot, head].astype(shape.dtype)
                products = _dot(q_ref[head, rows], keys, 1)
                if shape.quantized:
                    products = products * self._scales(0, at, head, first_row)
                scores = jnp.where(seen, self._as_exponents(products), HIDDEN)
                before = scratch.top[head, rows][:, :1]
                top = jnp.maximum(before, scores.max(axis=1, keepdims=True))
                weights, fade = jnp.exp2(scores - top), jnp.exp2(before - top)
                total = fade * scratch.total[head, rows][:, :1] + weights.sum(axis=1, keepdims=True)
                if shape.quantized:  # (the scale of a token that is not seen may be NaN)
                    weights = jnp.where(seen, weights * self._scales(1, at, head, first_row), 0.0)
                values = scratch.v[slot, head].astype(shape.dtype)
                added = _dot(weights.astype(shape.dtype), values, 0)
                scratch.acc[head, rows] = fade * scratch.acc[head, rows] + added
                scratch.top[head, rows] = jnp.broadcast_to(top, (shape.chunk, LANES))
                scratch.total[head, rows] = jnp.broadcast_to(total, (shape.chunk, LANES))

            self._each_head(one_head)

        live = self.given.lens[at.tile] * shape.group
        lax.fori_loop(0, (live + shape.chunk - 1) // shape.chunk, one_chunk, None)

    def _scales(self, which: int, at: Step, head: Any, first_row: Any) -> Any:
        """A chunk's scales of a block's keys (0) or values (1): f32[1, K], of a pair [chunk, K]."""
        shape, pool = self.shape, self.scratch.scales
        each = shape.scales_per_head
        place = (at.head_block * shape.config.block_heads * each) % shape.fetched_scales
        place, tokens = place + head * each, pl.ds(0, shape.tokens)
        scales = pool[which, pl.ds(place, 1), tokens]
        if each == 1:
            return scales
        rows = first_row + lax.broadcasted_iota(jnp.int32, (shape.chunk, 1), 0)
        second = rows // (shape.group // 2) % 2 == 1
        return jnp.where(second, pool[which, pl.ds(place + 1, 1), tokens], scales)

    def _each_head(self, body: Any) -> None:
        # Unrolled, the heads' small matrices overlap; large ones fill the units by themselves.
        heads = self.shape.config.block_heads
        lax.fori_loop(0, heads, body, None, unroll=self.shape.rows <= 16)

    def _as_exponents(self, products: Any) -> Any:
        """`q . k` as what softmax exponentiates, in base 2."""
        scale, cap = self.given.sm_scale[0], self.shape.soft_cap
        if cap is None:
            return products * (scale * LOG2E)
        return jnp.tanh(products * (scale / cap)) * (cap * LOG2E)

    def finish(self, o_ref: Any, lse_ref: Any) -> None:
        """Writes a tile's results. Queries that saw nothing get 0 and -inf."""
        rows = self.shape.rows
        across = lax.broadcasted_iota(jnp.int32, (rows, rows), 1)
        diagonal = lax.broadcasted_iota(jnp.int32, (rows, rows), 0) == across

        def one_head(head: Any, _: None) -> None:
            top, total = self.scratch.top[head][:, :1], self.scratch.total[head][:, :1]
            empty = total == 0.0
            total = jnp.where(empty, 1.0, total)
            o_ref[head] = (self.scratch.acc[head] / total).astype(o_ref.dtype)
            lse = jnp.where(empty, -jnp.inf, (top + jnp.log2(total)) * LN2)
            # From a column to a row.
            lse_ref[pl.ds(head, 1)] = jnp.where(diagonal, lse, -jnp.inf).max(axis=0, keepdims=True)

        self._each_head(one_head)


def _dot(x: Any, y: Any, axis: int) -> Any:
    """A matrix product over x's columns and y's `axis`, in f32; exact products of f32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, y, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
