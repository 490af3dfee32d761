"""The ragged kernel: tiles of queries walk over their rows' pages, block by block.

The grid is (tile, block of heads); its steps run one after another, and queries and results are
moved by Pallas' own pipeline. Pages, and the page ids that say where they are, are not: the blocks
of all steps form one chain, and while one is computed, the next one's pages are on their way from
HBM, and so are the ids of the one after that (in pieces of 128, each fetched once for the blocks
that follow each other in it). So neither the end of a row nor that of a tile drains the pipeline,
and scalar memory holds 256 page ids, however long the block tables are. A page of
`block_heads` heads is contiguous: one copy for its keys and one for its values. Pages that no query
of the tile may see (after its last position, before its window) are not fetched.

Quantised pages (fp8, int8) come with their scales, a copy for those of a page's keys and one for
those of its values; where a page's scales do not fill a register's lanes, they come with those of
other pages, and are turned into place. A block's numbers are widened to the queries' dtype, which
holds them exactly; a key's scale multiplies its column of the scores, a value's its column of the
weights.

Softmax is online (Milakov and Gimelshein, 2018, arXiv:1805.02867; FlashAttention), in base 2, with
f32 accumulators.

Letters: B tiles, H KV heads, h `block_heads`, Q packed query rows (token-major: row `i * G + g` is
token `i`'s head `g` of the group), D head_dim, P `page_size`, K tokens of a block; s scales
of a token that are fetched for h, S lanes of a page's scales.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.attention.mosaic_tpu.chain import Chain, Step
from paxattn.attention.mosaic_tpu.config import LANES
from paxattn.attention.mosaic_tpu.plan import Tiles
from paxattn.attention.mosaic_tpu.refs import Pools, Scalars, Scratch, Shape
from paxattn.attention.mosaic_tpu.softmax import Softmax
from paxattn.quantized import SCALE_DTYPE


def launch(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_ids: jax.Array,
    *scales: jax.Array,
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
        *scales: of the keys and of the values of quantised pages, bf16[L, N, H, P] each (or 2 H,
            see `Shape`); or of this layer only, as `op` lays them out: [1, N, H, P] or
            [1, Z, H, 128].
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
    rows, dim = shape.rows, shape.head_dim

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
    scratch = _scratch(shape)
    pools = Pools(k_pages, v_pages, page_ids, *scales)
    in_hbm = sum(pool is not None for pool in pools)

    def body(*refs: Any) -> None:
        rest = iter(refs)
        given = Scalars(*itertools.islice(rest, len(scalars)))
        q_ref, hbm = next(rest), Pools(*itertools.islice(rest, in_hbm))
        o_ref, lse_ref, common = next(rest), next(rest), (given, Scratch(*rest), shape)
        _step(Chain(hbm, *common), Softmax(*common), q_ref, o_ref, lse_ref)

    in_place = pl.BlockSpec(memory_space=pltpu.HBM)
    # (lse: with head blocks on an axis of their own, a block of it has whole last axes)
    o, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(jnp.maximum(tiles.count[0], 1), shape.head_blocks),
            in_specs=[pl.BlockSpec((None, heads, rows, dim), block), *(in_place,) * in_hbm],
            out_specs=[
                pl.BlockSpec((None, heads, rows, dim), block),
                pl.BlockSpec((None, None, heads, rows), block),
            ],
            scratch_shapes=[memory for memory in scratch if memory is not None],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_tiles, shape.num_kv_heads, rows, dim), shape.out_dtype),
            jax.ShapeDtypeStruct((num_tiles, shape.head_blocks, heads, rows), jnp.float32),
        ],
        # Every page id is in range (see `extent.readable`), and to check two addresses of each
        # copy would take the scalar unit as long as all else that it does to send for a page.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="paged_ragged",
    )(*scalars, q, *pools[:in_hbm])
    return o, lse.reshape(num_tiles, shape.num_kv_heads, rows)


def _scratch(shape: Shape) -> Scratch:
    """The memories that the kernel is given."""
    heads, rows, dim = shape.config.block_heads, shape.rows, shape.head_dim
    tokens = shape.tokens
    scratch = Scratch(
        k=pltpu.VMEM((2, heads, tokens, dim), shape.page_dtype),
        v=pltpu.VMEM((2, heads, tokens, dim), shape.page_dtype),
        page_ids=pltpu.SMEM((2, 1, LANES), jnp.int32),
        piece=pltpu.SMEM((1,), jnp.int32),
        acc=pltpu.VMEM((heads, rows, dim), jnp.float32),
        top=pltpu.VMEM((heads, rows, LANES), jnp.float32),
        total=pltpu.VMEM((heads, rows, LANES), jnp.float32),
        number=pltpu.SMEM((1,), jnp.int32),
        k_arrived=pltpu.SemaphoreType.DMA((2,)),
        v_arrived=pltpu.SemaphoreType.DMA((2,)),
        ids_arrived=pltpu.SemaphoreType.DMA((2,)),
    )
    if not shape.quantized:
        return scratch
    staged = 2, shape.config.block_pages, shape.fetched_scales, shape.scale_lanes
    return scratch._replace(
        k_scales=pltpu.VMEM(staged, SCALE_DTYPE),
        v_scales=pltpu.VMEM(staged, SCALE_DTYPE),
        lanes=pltpu.SMEM((2, LANES), jnp.int32),
        scales=pltpu.VMEM((2, shape.fetched_scales, max(tokens, LANES)), jnp.float32),
    )


def _step(chain: Chain, softmax: Softmax, q_ref: Any, o_ref: Any, lse_ref: Any) -> None:
    """Computes one tile in one block of heads, and sends for what comes after it."""
    count, number = chain.given.count[0], chain.scratch.number
    tile, head_block = pl.program_id(0), pl.program_id(1)
    first, last = chain.first_block(tile), chain.last_block(tile)

    @pl.when((tile == 0) & (head_block == 0) & (count > 0))
    def _() -> None:
        number[0] = 0
        chain.begin(Step(tile, head_block, first))

    @pl.when(tile < count)
    def _() -> None:
        softmax.begin()
        done = number[0]

        def visit(block: Any, _: None) -> None:
            here = Step(tile, head_block, block)
            slot = (done + block - first) % 2
            chain.follow(here, 1 - slot)
            chain.pages(here, slot, start=False)
            softmax.place_scales(slot)
            softmax.clear_tail(here, slot)
            softmax.attend(here, slot, q_ref)

        lax.fori_loop(first, last + 1, visit, None)
        number[0] = done + last + 1 - first
        softmax.finish(o_ref, lse_ref)
