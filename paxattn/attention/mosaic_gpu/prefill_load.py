"""How blocks of K and V come to shared memory in the prefill kernel for Hopper; its memory.

The producer fills a ring of stages, which the consumers read (`prefill_kernel`).

Quantised pages are read by a fourth warpgroup, the *widener*. The producer fills a ring of narrow
blocks, with the scales of their tokens; the widener multiplies numbers by scales and rounds to the
queries' dtype, into the ring that the consumers read. They find there what pages of that dtype
would hold, and nothing else changes for them. (Scales on scores and weights instead would take 64
numbers per consumer's thread, of 128 tokens; it has hardly any registers left.) Scales of slots
that nobody owns may be NaN, like all that slots hold: K's scores are masked, and rows of V cleared
behind the widener.

Letters: D head_dim, S `block_kv`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from paxattn.attention.mosaic_gpu.common import (
    barriers,
    copy_layout,
    fetch,
    load,
    narrow_operand,
    operand,
    widen_rows,
)
from paxattn.attention.mosaic_gpu.prefill_config import TILE
from paxattn.attention.mosaic_gpu.prefill_work import Refs, Static, item_at, num_items, walk_of
from paxattn.quantized import SCALE_DTYPE

CONSUMERS = 2
ROWS = TILE // CONSUMERS  # packed query rows of one: M of a wgmma
_i32 = jnp.int32


class Ring(NamedTuple):
    """Blocks of K and of V, in as many places as barriers say."""

    k: Any  # [places, S, D]
    v: Any
    k_there: Any
    v_there: Any
    k_free: Any
    v_free: Any
    k_scales: Any = None  # bf16[places, S], of quantised pages
    v_scales: Any = None

    def sides(self) -> tuple[tuple[Any, ...], ...]:
        """K's part and V's: blocks, scales, and the two barriers."""
        return (
            (self.k, self.k_scales, self.k_there, self.k_free),
            (self.v, self.v_scales, self.v_there, self.v_free),
        )


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """SMEM and barriers."""

    q: Any  # [2, 64, D]
    lse: Any  # f32[2, 64]
    q_there: Any
    turn: Any
    ring: Ring  # what the consumers read
    narrow: Ring | None = None  # quantised blocks, what the widener reads
    o: Any = None  # [2, 64, D], or None: in q
    p: Any = None  # [2, 64, S], in the interpreter only

    @property
    def copied(self) -> Ring:
        """What the producer fills."""
        return self.narrow or self.ring


def scratch(s: Static) -> dict[str, Any]:
    """The kernel's `Scratch`, as types."""
    block, places = s.config.block_kv, s.config.places
    rows = operand(CONSUMERS, ROWS, s.head_dim, dtype=s.dtype)
    blocks = operand(places, block, s.head_dim, dtype=s.dtype)
    there, free = barriers(places, 1 if s.scales else s.copies), barriers(places, CONSUMERS)
    out = dict(
        q=rows,
        lse=plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        q_there=barriers(CONSUMERS),
        turn=barriers(1, CONSUMERS),
        ring=Ring(blocks, blocks, there, there, free, free),
    )
    if s.config.own_output(s.head_dim):
        out |= dict(o=rows)
    if s.scales:
        stages = s.config.stages
        numbers = narrow_operand(stages, block, s.head_dim, dtype=s.page_dtype)
        scales = plgpu.SMEM((stages, block), SCALE_DTYPE)
        there, free = barriers(stages, 2 * s.copies), barriers(stages)
        out |= dict(narrow=Ring(numbers, numbers, there, there, free, free, scales, scales))
    if s.interpret:
        out |= dict(p=operand(CONSUMERS, ROWS, block, dtype=s.dtype))
    return out


def produce(s: Static, refs: Refs, smem: Scratch) -> None:
    """The producer warp: fills the ring, item after item."""
    stages, copy = s.config.stages, s.copy
    layer, window = refs.numbers[2], refs.numbers[3]

    def work(nth: jax.Array, filled: jax.Array) -> jax.Array:
        item = item_at(s, refs, nth)
        walk = walk_of(s, item.tile, window)
        last = lax.div(jnp.maximum(item.tile.stored, 1) - 1, _i32(s.page_size))

        def step(j: jax.Array, filled: jax.Array) -> jax.Array:
            slot = lax.rem(filled, _i32(stages))
            first = walk.start + walk.block(j) * s.config.block_kv
            logical = lax.div(first, _i32(s.page_size))
            part = lax.div(first - logical * s.page_size, _i32(copy))  # of a page larger than S

            def page(i: int) -> jax.Array:
                """Of copy `i`; past the end the last page once more."""
                entry = refs.block_tables[item.tile.row, jnp.minimum(logical + i, last)]
                return jnp.clip(entry, 0, s.num_pages - 1)

            # Asked for before the wait for a free slot, and there when it ends.
            ids = [page(i) for i in range(min(s.copies, s.early))]
            pools = (refs.k_pages, refs.k_scales), (refs.v_pages, refs.v_scales)
            for (pool, pool_scales), side in zip(pools, smem.copied.sides(), strict=True):
                blocks, scales, there, free = side
                pl.when(filled >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                for i in range(s.copies):
                    number = ids[i] if i < len(ids) else page(i)
                    for of, to in ((pool, blocks), (pool_scales, scales))[: 2 if s.scales else 1]:
                        source = of.at[layer, number, item.head]
                        if copy < s.page_size:
                            source = source.at[pl.ds(part * copy, copy)]
                        target = to.at[slot, pl.ds(i * copy, copy)]
                        fetch(source, target, there.at[slot])
            return filled + 1

        return lax.fori_loop(0, walk.blocks, step, filled)

    _drain(smem.copied, stages, lax.fori_loop(0, num_items(s, refs), work, _i32(0)))


def _drain(ring: Ring, places: int, filled: jax.Array) -> None:
    """Waits until nobody reads a ring any more."""

    @pl.loop(jnp.maximum(filled - places, 0), filled)
    def _(i: jax.Array) -> None:
        plgpu.barrier_wait(ring.k_free.at[lax.rem(i, _i32(places))])
        plgpu.barrier_wait(ring.v_free.at[lax.rem(i, _i32(places))])


def widen(s: Static, refs: Refs, smem: Scratch) -> None:
    """The widener: turns narrow blocks into wide ones."""
    stages, places, window = _i32(s.config.stages), _i32(s.config.places), refs.numbers[3]
    layout = copy_layout(s.config.block_kv, s.head_dim)

    def one_block(i: jax.Array, done: jax.Array) -> jax.Array:
        del i
        source, target = lax.rem(done, stages), lax.rem(done, places)
        for narrow, wide in zip(smem.copied.sides(), smem.ring.sides(), strict=True):
            numbers, scales, there, free = narrow
            blocks, _, wide_there, wide_free = wide
            plgpu.barrier_wait(there.at[source])
            pl.when(done >= places)(functools.partial(plgpu.barrier_wait, wide_free.at[target]))
            factors = load(scales.at[source], layout.reduce(1))
            widen_rows(numbers.at[source], factors, blocks.at[target], layout)
            # What was written, for `wgmma`; and what was read, before TMA writes there again.
            plgpu.commit_smem()
            plgpu.barrier_arrive(free.at[source])
            plgpu.barrier_arrive(wide_there.at[target])
        return done + 1

    def work(nth: jax.Array, done: jax.Array) -> jax.Array:
        walk = walk_of(s, item_at(s, refs, nth).tile, window)
        return lax.fori_loop(0, walk.blocks, one_block, done)

    done = lax.fori_loop(0, num_items(s, refs), work, _i32(0))
    _drain(smem.ring, s.config.places, done)
