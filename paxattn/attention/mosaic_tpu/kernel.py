"""The ragged kernel: tiles of queries walk over their rows' pages, block by block.

The grid is (tile, block of heads); its steps run one after another, and queries and results are
moved by Pallas' own pipeline. Pages, and the page ids that say where they are, are not: the blocks
of all steps form one chain, and while one is computed, the next one's pages are on their way from
HBM, and so are the ids of the one after that. So neither the end of a row nor that of a tile drains
the pipeline, and scalar memory holds 256 page ids, however long the block tables are. A page of
`block_heads` heads is contiguous: one copy for its keys and one for its values. Pages that no query
of the tile may see (after its last position, before its window) are not fetched.

Softmax is online (Milakov and Gimelshein, 2018, arXiv:1805.02867; FlashAttention), in base 2, with
f32 accumulators.

Letters: B tiles, H KV heads, h `block_heads`, Q packed query rows (token-major: row `i * G + g` is
token `i`'s head `g` of the group), D head_dim, P `page_size`, K tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.attention.mosaic_tpu.config import CHUNK, LANES, Config, lie_across, packed_rows
from paxattn.attention.mosaic_tpu.plan import Tiles

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
HIDDEN = -2e38  # a score that is not seen
NOTHING = -1e38  # the least maximum: above it, so that what is hidden weighs exp2(-inf) = 0


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
        dtype: of queries and pages.
        out_dtype: of the result.
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
    out_dtype: Any

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
    def across(self) -> bool:
        """Whether pages lie as [D, P]: see `config.lie_across`."""
        return lie_across(self.head_dim, self.page_size)

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


class Step(NamedTuple):
    """A block of the chain: i32 scalars. `tile` is beyond the last where the chain has ended."""

    tile: Any
    head_block: Any
    block: Any


class Scratch(NamedTuple):
    """Memory of the kernel's own.

    Attributes:
        k: [2, h, K, D], or [2, h, D, K] of pages that lie across: two blocks of keys, one computed,
            one on its way.
        v: same.
        page_ids: i32[2, 1, 128] in scalar memory.
        acc: f32[h, Q, D], the result before it is divided by `total`.
        top: f32[h, Q, 128], the largest score so far, the same in all columns.
        total: f32[h, Q, 128], the sum of weights.
        number: i32[1], blocks of the chain computed so far.
        k_arrived: semaphores, one per block.
        v_arrived: same.
        ids_arrived: same.
    """

    k: Any
    v: Any
    page_ids: Any
    acc: Any
    top: Any
    total: Any
    number: Any
    k_arrived: Any
    v_arrived: Any
    ids_arrived: Any


def launch(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_ids: jax.Array,
    *,
    tiles: Tiles,
    layer: jax.Array,
    window: jax.Array,
    sm_scale: jax.Array,
    shape: Shape,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Serves the tiles of one launch.

    Args:
        q: [B, H, Q, D].
        k_pages: [L, N, H, P, D].
        v_pages: same.
        page_ids: i32[R, ceil(M / 128), 1, 128].
        tiles: which tokens each tile reads.
        layer: i32[].
        window: i32[]; not positive: none.
        sm_scale: f32[].
        shape: what is static.
        interpret: parameters of Pallas' TPU interpreter, or False.

    Returns:
        o [B, H, Q, D] and lse f32[B, H, Q], undefined for tiles beyond the last.
    """
    num_tiles, heads = q.shape[0], shape.config.block_heads
    rows, dim, tokens = shape.rows, shape.head_dim, shape.tokens

    def block(tile: Any, head_block: Any, *_: Any) -> tuple:
        return tile, head_block, 0, 0

    scalars = Scalars(
        rows=tiles.rows,
        lens=tiles.lens,
        positions=tiles.positions,
        starts=tiles.starts,
        stops=tiles.stops,
        count=tiles.count,
        layer=layer.reshape(1),
        window=window.reshape(1),
        sm_scale=sm_scale.reshape(1),
    )
    block_of_kv = (dim, tokens) if shape.across else (tokens, dim)
    if shape.across:
        k_pages, v_pages = k_pages.swapaxes(-1, -2), v_pages.swapaxes(-1, -2)
    scratch = Scratch(
        k=pltpu.VMEM((2, heads, *block_of_kv), shape.dtype),
        v=pltpu.VMEM((2, heads, *block_of_kv), shape.dtype),
        page_ids=pltpu.SMEM((2, 1, LANES), jnp.int32),
        acc=pltpu.VMEM((heads, rows, dim), jnp.float32),
        top=pltpu.VMEM((heads, rows, LANES), jnp.float32),
        total=pltpu.VMEM((heads, rows, LANES), jnp.float32),
        number=pltpu.SMEM((1,), jnp.int32),
        k_arrived=pltpu.SemaphoreType.DMA((2,)),
        v_arrived=pltpu.SemaphoreType.DMA((2,)),
        ids_arrived=pltpu.SemaphoreType.DMA((2,)),
    )

    def body(*refs: Any) -> None:
        given, refs = refs[: len(Scalars._fields)], refs[len(Scalars._fields) :]
        q_ref, k_hbm, v_hbm, ids_hbm, o_ref, lse_ref = refs[:6]
        walk = _Walk(Scalars(*given), (k_hbm, v_hbm, ids_hbm), Scratch(*refs[6:]), shape)
        walk.step(q_ref, o_ref, lse_ref)

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    # (lse: with head blocks on an axis of their own, a block of it has whole last axes)
    o, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(jnp.maximum(tiles.count[0], 1), shape.head_blocks),
            in_specs=[pl.BlockSpec((None, heads, rows, dim), block), *(anywhere,) * 3],
            out_specs=[
                pl.BlockSpec((None, heads, rows, dim), block),
                pl.BlockSpec((None, None, heads, rows), block),
            ],
            scratch_shapes=list(scratch),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_tiles, shape.num_kv_heads, rows, dim), shape.out_dtype),
            jax.ShapeDtypeStruct((num_tiles, shape.head_blocks, heads, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="paged_ragged",
    )(*scalars, q, k_pages, v_pages, page_ids)
    return o, lse.reshape(num_tiles, shape.num_kv_heads, rows)


class _Walk:
    """The kernel's body: one step of the grid, with the references that its parts share."""

    def __init__(self, given: Scalars, hbm: tuple, scratch: Scratch, shape: Shape) -> None:
        self.given, self.scratch, self.shape = given, scratch, shape
        self.k_hbm, self.v_hbm, self.ids_hbm = hbm

    def step(self, q_ref: Any, o_ref: Any, lse_ref: Any) -> None:
        """Computes one tile in one block of heads, and sends for what comes after it."""
        given, scratch = self.given, self.scratch
        tile, head_block = pl.program_id(0), pl.program_id(1)

        @pl.when((tile == 0) & (head_block == 0) & (given.count[0] > 0))
        def _() -> None:
            scratch.number[0] = 0
            begin = Step(tile, head_block, self._first_block(tile))
            self._ids(begin, 0).start()
            self._follow(begin, 0)

        @pl.when(tile < given.count[0])
        def _() -> None:
            scratch.acc[...] = jnp.zeros_like(scratch.acc)
            scratch.total[...] = jnp.zeros_like(scratch.total)
            scratch.top[...] = jnp.full_like(scratch.top, NOTHING)
            first, number = self._first_block(tile), scratch.number[0]

            def visit(block: Any, _: None) -> None:
                here = Step(tile, head_block, block)
                slot = (number + block - first) % 2
                self._follow(self._after(here), 1 - slot)
                self._pages(here, slot, start=False)
                self._clear_tail(here, slot)
                self._attend(here, slot, q_ref)

            lax.fori_loop(first, self._last_block(tile) + 1, visit, None)
            scratch.number[0] = number + self._last_block(tile) + 1 - first
            self._finish(o_ref, lse_ref)

    # The chain.

    def _first_block(self, tile: Any) -> Any:
        return self.given.starts[tile] // self.shape.tokens

    def _last_block(self, tile: Any) -> Any:
        """At least the first: a tile that reads nothing has a block of no pages."""
        last = (self.given.stops[tile] - 1) // self.shape.tokens
        return jnp.maximum(last, self._first_block(tile))

    def _after(self, at: Step) -> Step:
        """The chain's next block."""
        more = at.block < self._last_block(at.tile)
        turn = ~more & (at.head_block + 1 == self.shape.head_blocks)
        tile = at.tile + turn.astype(jnp.int32)
        head_block = jnp.where(turn, 0, at.head_block + (~more).astype(jnp.int32))
        known = jnp.minimum(tile, self.given.count[0] - 1)
        return Step(tile, head_block, jnp.where(more, at.block + 1, self._first_block(known)))

    def _follow(self, at: Step, slot: Any) -> None:
        """Sends for the pages of a block, whose ids are on their way, and the ids of the next."""

        @pl.when(at.tile < self.given.count[0])
        def _() -> None:
            self._ids(at, slot).wait()
            self._pages(at, slot, start=True)
            after = self._after(at)

            @pl.when(after.tile < self.given.count[0])
            def _() -> None:
                self._ids(after, 1 - slot).start()

    def _ids(self, at: Step, slot: Any) -> Any:
        """The copy of the piece of the block tables in which a block's page ids are."""
        piece = at.block * self.shape.config.block_pages // LANES
        return pltpu.make_async_copy(
            self.ids_hbm.at[self.given.rows[at.tile], piece],
            self.scratch.page_ids.at[slot],
            self.scratch.ids_arrived.at[slot],
        )

    def _pages(self, at: Step, slot: Any, *, start: bool) -> None:
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

    # The arithmetic.

    def _clear_tail(self, at: Step, slot: Any) -> None:
        """Zeroes the values that no query sees: a weight of 0 times what lies there may be NaN."""
        given, values = self.given, self.scratch.v
        first = at.block * self.shape.tokens
        start, stop = given.starts[at.tile], given.stops[at.tile]

        @pl.when((first < start) | (first + self.shape.tokens > stop))
        def _() -> None:
            axis = 1 if self.shape.across else 0
            token = first + lax.broadcasted_iota(jnp.int32, values.shape[2:], axis)
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

    def _attend(self, at: Step, slot: Any, q_ref: Any) -> None:
        """Adds a block of keys and values to the result of all heads, chunk after chunk."""
        scratch, shape = self.scratch, self.shape
        across = int(shape.across)

        def one_chunk(chunk: Any, _: None) -> None:
            first_row = pl.multiple_of(chunk * shape.chunk, shape.chunk)
            rows = pl.ds(first_row, shape.chunk)
            seen = self._seen(at, first_row)

            def one_head(head: Any, _: None) -> None:
                scores = self._scores(_dot(q_ref[head, rows], scratch.k[slot, head], 1 - across))
                scores = jnp.where(seen, scores, HIDDEN)
                before = scratch.top[head, rows][:, :1]
                top = jnp.maximum(before, scores.max(axis=1, keepdims=True))
                weights, fade = jnp.exp2(scores - top), jnp.exp2(before - top)
                total = fade * scratch.total[head, rows][:, :1] + weights.sum(axis=1, keepdims=True)
                values = scratch.v[slot, head]
                added = _dot(weights.astype(values.dtype), values, across)
                scratch.acc[head, rows] = fade * scratch.acc[head, rows] + added
                scratch.top[head, rows] = jnp.broadcast_to(top, (shape.chunk, LANES))
                scratch.total[head, rows] = jnp.broadcast_to(total, (shape.chunk, LANES))

            self._each_head(one_head)

        live = self.given.lens[at.tile] * shape.group
        lax.fori_loop(0, (live + shape.chunk - 1) // shape.chunk, one_chunk, None)

    def _each_head(self, body: Any) -> None:
        # Unrolled, the heads' small matrices overlap; large ones fill the units by themselves.
        heads = self.shape.config.block_heads
        lax.fori_loop(0, heads, body, None, unroll=self.shape.rows <= 16)

    def _scores(self, products: Any) -> Any:
        """`q . k` as what softmax exponentiates, in base 2."""
        scale, cap = self.given.sm_scale[0], self.shape.soft_cap
        if cap is None:
            return products * (scale * LOG2E)
        return jnp.tanh(products * (scale / cap)) * (cap * LOG2E)

    def _finish(self, o_ref: Any, lse_ref: Any) -> None:
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
