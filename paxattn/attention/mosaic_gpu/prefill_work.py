"""What a thread block of the prefill kernel works on: its items, and the blocks of KV of each.

Scalar arithmetic that producer and consumers do alike. Letters as in `prefill`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paxattn.attention.mosaic_gpu.prefill_config import Config
from paxattn.attention.mosaic_gpu.prefill_tiles import Tile

_i32 = jnp.int32


@dataclass(frozen=True, kw_only=True)
class Static:
    """What the kernel is compiled for (letters as above)."""

    group: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int
    dtype: Any
    causal: bool
    window: bool
    soft_cap: float | None
    config: Config
    interpret: bool
    page_dtype: Any = None  # of quantised pages

    @property
    def scales(self) -> bool:
        """Whether pages are quantised, with scales."""
        return self.page_dtype is not None

    @property
    def copy(self) -> int:
        """Tokens per TMA copy: a page, or the part of one that fits a block."""
        return min(self.page_size, self.config.block_kv)

    @property
    def copies(self) -> int:
        """TMA copies per block."""
        return self.config.block_kv // self.copy

    @property
    def registers(self) -> tuple[int, ...]:
        """Per thread of a consumer, of the producer, and of who widens quantised pages.

        All warpgroups start with 168 (of four, 128): what the consumers gain, the others must have
        given up (2 x 224 + 56 = 3 x 168, 2 x 200 + 40 + 72 = 4 x 128), or they wait forever.
        """
        if self.scales:
            return 200, 40, 72
        return (240, 24) if self.head_dim > 128 else (224, 56)

    @property
    def early(self) -> int:
        """Page ids that the producer holds while it waits: as many as its registers allow."""
        return 2 if self.head_dim > 128 or self.scales else 16


class Refs(NamedTuple):
    """This CTA's number, and GMEM."""

    cta: jax.Array  # (jax 0.10 does not tell it to a warp)
    q: Any  # [Hkv, B, 128, D], of B tiles
    k_pages: Any  # [L, N, Hkv, P, D]
    v_pages: Any
    block_tables: Any  # i32[R, M]
    fields: Any  # i32[S * B, 7], `Tile`s, of up to S pieces of each
    numbers: Any  # i32[4]: tiles, KV heads side by side, layer, window (positive)
    scale: Any  # f32[1], sm_scale, times log2(e) unless there is a soft cap
    o: Any  # [Hkv, S * B, 128, D]
    lse: Any  # f32[Hkv, S * B, 128]
    k_scales: Any = None  # bf16[L, N, Hkv, P], of quantised pages
    v_scales: Any = None  # same

    @classmethod
    def of(cls, cta: jax.Array, *given: Any) -> Refs:
        """Sorts a kernel's references: scales come before the outputs."""
        return cls(cta, *given[:7], *given[-2:], *given[7:-2])


class Item(NamedTuple):
    """One item of work: a tile, for one KV head."""

    head: jax.Array
    tile: Tile


def _position(s: Static, refs: Refs, nth: jax.Array) -> jax.Array:
    """This CTA's position in the `nth` pass through the list, there and back."""
    return jnp.where(lax.rem(nth, _i32(2)) == 1, s.config.num_ctas - 1 - refs.cta, refs.cta)


def queries_at(refs: Refs, item: Item) -> tuple[jax.Array, jax.Array]:
    """Where an item's queries are: its pieces share them."""
    place = item.tile.place
    if refs.o.shape[1] > refs.q.shape[1]:
        place = lax.rem(place, _i32(refs.q.shape[1]))
    return item.head, place


def num_items(s: Static, refs: Refs) -> jax.Array:
    """How many items this CTA works on."""
    ctas = s.config.num_ctas
    total = refs.numbers[0] * s.num_kv_heads
    passes = lax.div(total, _i32(ctas))
    return passes + (_position(s, refs, passes) < total - passes * ctas).astype(_i32)


def item_at(s: Static, refs: Refs, nth: jax.Array) -> Item:
    """This CTA's `nth` item: some heads side by side, tile after tile; then the next heads.

    Beyond the list (somebody looks ahead) it is an item that can be read, but need not be.
    """
    count, together = jnp.maximum(refs.numbers[0], 1), refs.numbers[1]
    number = jnp.minimum(
        nth * s.config.num_ctas + _position(s, refs, nth), count * s.num_kv_heads - 1
    )
    heads = lax.div(number, count * together)
    rest = number - heads * count * together
    width = jnp.minimum(together, s.num_kv_heads - heads * together)
    rank = lax.div(rest, width)
    tile = Tile(*(refs.fields[rank, i] for i in range(len(Tile._fields))))
    return Item(heads * together + rest - rank * width, tile)


class Walk(NamedTuple):
    """The blocks of KV that a tile needs (i32 scalars).

    Attributes:
        start: first token read, where block 0 begins.
        blocks: how many.
        plain: the first block that every query sees whole.
        num_plain: how many of those there are.
    """

    start: jax.Array
    blocks: jax.Array
    plain: jax.Array
    num_plain: jax.Array

    def block(self, step: jax.Array) -> jax.Array:
        """The block walked in a step: those that need no mask first, then the others in order."""
        edge = step - self.num_plain
        before = jnp.where(edge < self.plain, edge, step)
        return jnp.where(step < self.num_plain, self.plain + step, before)


def _div_up(a: jax.Array, b: int) -> jax.Array:
    """`ceil(a / b)`; 0 for a negative `a`."""
    return lax.div(jnp.maximum(a, 0) + (b - 1), _i32(b))


def walk_of(s: Static, tile: Tile, window: jax.Array) -> Walk:
    """Finds a tile's blocks; the window is positive."""
    block = s.config.block_kv
    first = tile.history + lax.div(tile.first_packed, _i32(s.group))  # its first query's position
    end = jnp.minimum(tile.stored, tile.last + 1) if s.causal else tile.stored
    whole = jnp.minimum(tile.stored, first + 1) if s.causal else tile.stored  # seen by all
    start, plain = tile.begin, _i32(0)
    if s.window:
        lowest = jnp.maximum(first - window + 1, 0)
        start = jnp.maximum(lax.div(lowest, _i32(s.copy)) * s.copy, start)
        plain = _div_up(tile.last - window + 1 - start, block)
    blocks = _div_up(end - start, block)
    plain = jnp.minimum(plain, blocks)
    num_plain = jnp.maximum(lax.div(jnp.maximum(whole - start, 0), _i32(block)) - plain, 0)
    return Walk(start, blocks, plain, num_plain)
