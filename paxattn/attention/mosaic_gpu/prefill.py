"""Ragged prefill over paged KV on Hopper: the kernel for rows with many queries.

In the form of FlashAttention-3 (Shah et al., 2024), with the pipeline of JAX's own dense kernel
(`jax.experimental.pallas.ops.gpu.attention_mgpu`). A tile (see `prefill_tiles`) is 128 packed query
rows of one KV head. A CTA has three warpgroups:

    producer (one warp)       for each block of a tile's KV: one TMA copy per page into a ring of
                              stages, keys and values on their own barriers
    two consumers, 64 rows    S = Q K^T (wgmma, both from SMEM), online softmax in registers,
                              O += P V (wgmma, P from registers), one block after the other

    barrier   arrivals              says
    q         1 copy                a consumer's queries are in SMEM (one barrier per consumer)
    k, v      1 per page of a block the block in this stage is there
    k_free,   both consumers        nobody reads this stage's block any more
    v_free
    turn      both consumers        the consumers move in step, half a block apart: while one is in
                                    its softmax the tensor cores are the other's ("ping-pong")

Blocks that every query of the tile sees whole are walked first, by a loop without masks; then
those on the edges (the causal diagonal, the window's lower end, the sequence's end). The order is
free, since the softmax is online; producer and consumers derive it from the same `Walk`. Blocks
beyond the tile's last query are not read, nor pages before the window's reach.

What a page's unowned slots hold is anybody's, NaN included. Scores there are masked by selection.
A weight of 0 does not mend a value of NaN, so in the block where the sequence ends the first
consumer clears the value rows past it in SMEM; the second reads them half a block later, behind
two phases of `turn`.

The grid is persistent: CTA `c` of `C` works on items `c`, `2C - 1 - c`, `2C + c`, ... of the list
(each pass through the CTAs turns round, because a static deal of descending lengths in one
direction would give the first CTAs the longest tile every time). With `num_ctas` as large as the
list every item has a CTA of its own and the hardware deals.

Where shared memory allows (`Config.own_output`), a consumer asks for the next item's queries as
soon as the last block has been folded, so that they arrive during the epilogue.

Queries and results are tile-major, gathered before and scattered after by XLA: a TMA box of 8-row
tiles cannot start at any token, and nothing past a row's end may be written.

Checked in Pallas' interpreter (numbers, barriers, races) and by compiling for an H200 (layouts,
registers, spills, SMEM). The interpreter does not see layouts, whether wgmma has finished, or a
missing `commit_smem`. It has no wgmma with an operand or an accumulator that lives on in
registers either: `_add_product` has another form there.

Letters: T tokens, R rows, M `max_pages_per_seq`, L layers, N pages, P `page_size`, D head_dim, Hq
and Hkv heads, G = Hq / Hkv; S `block_kv`, B tiles.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from paxattn.attention.mosaic_gpu import prefill_kernel, prefill_tiles
from paxattn.attention.mosaic_gpu.common import LOG2E
from paxattn.attention.mosaic_gpu.prefill_config import Config
from paxattn.attention.mosaic_gpu.prefill_kernel import CONSUMERS
from paxattn.attention.mosaic_gpu.prefill_tiles import Tiles
from paxattn.attention.mosaic_gpu.prefill_work import Static


def prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    block_tables: jax.Array,
    cu_q_lens: jax.Array,
    layer: jax.Array | int,
    sm_scale: jax.Array | float,
    sliding_window: jax.Array | int | None,
    causal: bool,
    soft_cap: float | None,
    tiles: Tiles,
    config: Config,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the rows of a ragged batch that were cut into tiles, without sinks.

    Arguments as `paged_attention_reference` has them, of requests that `prefill_config.check`
    accepts.

    Args:
        q: [T, Hq, D], bf16 or f16.
        k_pages: [L, N, Hkv, P, D], q's dtype.
        v_pages: same.
        block_tables: i32[R, M]; what follows an entry that is no page is hidden.
        cu_q_lens: i32[R + 1].
        layer: i32[].
        sm_scale: positive factor on `q . k`.
        sliding_window: i32[] (not positive: none), or None, which makes a smaller kernel.
        causal: whether a query is blind to later positions.
        soft_cap: `cap * tanh(s / cap)` on scaled scores, or None.
        tiles: from `prefill_tiles.cut`, for the same window.
        config: block sizes.
        interpret: `plgpu.InterpretGPUParams` to run in Pallas' interpreter.

    Returns:
        o [T, Hq, D] in q's dtype and lse f32[T, Hq]; 0 and -inf for tokens of rows that are in no
        tile, for padding, and for tokens that see nothing.
    """
    tokens, num_q_heads, head_dim = q.shape
    num_layers, num_pages, num_kv_heads, page_size, _ = k_pages.shape
    s = Static(
        group=num_q_heads // num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        num_pages=num_pages,
        dtype=q.dtype,
        causal=causal,
        window=sliding_window is not None,
        soft_cap=soft_cap,
        config=config,
        interpret=interpret is not None,
    )
    window = jnp.asarray(0 if sliding_window is None else sliding_window, jnp.int32)
    layer = jnp.clip(jnp.asarray(layer, jnp.int32), 0, num_layers - 1)
    scale = jnp.asarray(sm_scale, jnp.float32).reshape(1)
    packed = prefill_tiles.pack_queries(q, tiles, cu_q_lens, num_kv_heads)
    o, lse = plgpu.kernel(
        prefill_kernel.kernel(s),
        out_type=(
            jax.ShapeDtypeStruct(packed.shape, q.dtype),
            jax.ShapeDtypeStruct(packed.shape[:3], jnp.float32),
        ),
        scratch_types=prefill_kernel.scratch(s),
        grid=(s.config.num_ctas,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else dict(interpret=interpret)),
    )(
        packed,
        k_pages,
        v_pages,
        block_tables,
        tiles.fields,
        jnp.stack([tiles.count, tiles.heads_together, layer, window]),
        scale if soft_cap is not None else scale * LOG2E,
    )
    return prefill_tiles.unpack(o, lse, tiles, tokens)
