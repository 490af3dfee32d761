"""The portable prefill kernel: ragged queries over paged KV, in tiles of 32 or 64 query rows.

Tiles, their order and the way over their blocks of KV are those of the kernel for Hopper
(`prefill_tiles`, `prefill_work`), with smaller tiles: a thread block is one warpgroup. The grid is
persistent, and deals as that one does. Blocks that every query of a tile sees whole are walked
first, by a loop without masks.

Letters: T tokens, R rows, M entries of a row's block table, L layers, N pages, P `page_size`, D
head_dim, Hq and Hkv heads, B tiles.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from paxattn.attention.mosaic_gpu import prefill_tiles
from paxattn.attention.mosaic_gpu.common import LN2, LOG2E, LOWEST
from paxattn.attention.mosaic_gpu.portable import fold
from paxattn.attention.mosaic_gpu.portable.decode import positive
from paxattn.attention.mosaic_gpu.portable.ring import Job, Pools, Ring, Tile, scratch
from paxattn.attention.mosaic_gpu.prefill_config import Config
from paxattn.attention.mosaic_gpu.prefill_tiles import Tiles
from paxattn.attention.mosaic_gpu.prefill_work import Refs, Static, item_at, num_items, walk_of


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
    tma: bool,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the rows of a ragged batch that were cut into tiles, without sinks.

    Args:
        q: [T, Hq, D], bf16 or f16.
        k_pages: [L, N, Hkv, P, D], q's dtype.
        v_pages: same.
        block_tables: i32[R, M]; what follows an entry that is no page is hidden.
        cu_q_lens: i32[R + 1].
        layer: i32[].
        sm_scale: factor on `q . k`.
        sliding_window: i32[] (not positive: none), or None, which makes a smaller kernel.
        causal: whether a query is blind to later positions.
        soft_cap: `cap * tanh(s / cap)` on scaled scores, or None.
        tiles: from `prefill_tiles.cut`, of `config.max_rows`, for the same window.
        config: block sizes.
        tma: whether the card has TMA.
        interpret: `plgpu.InterpretGPUParams` to run in Pallas' interpreter.

    Returns:
        o [T, Hq, D] in q's dtype and lse f32[T, Hq]; 0 and -inf for tokens of rows that are in no
        tile, for padding, and for tokens that see nothing.
    """
    tokens, num_q_heads, head_dim = q.shape
    num_layers, num_pages, num_kv_heads, page_size, _ = k_pages.shape
    common: dict[str, Any] = dict(
        group=num_q_heads // num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        num_pages=num_pages,
        dtype=q.dtype,
        causal=causal,
        window=sliding_window is not None,
        soft_cap=soft_cap,
        interpret=interpret is not None,
    )
    s = Static(**common, num_kv_heads=num_kv_heads, config=config)
    t = Tile(
        **common,
        rows=tiles.size,
        max_pages=block_tables.shape[1],
        block_kv=config.block_kv,
        stages=config.stages,
        tma=tma,
    )
    packed = prefill_tiles.pack_queries(q, tiles, cu_q_lens, num_kv_heads)

    def portable_prefill(*given: Any) -> None:
        refs = Refs(lax.axis_index("cta"), *given[:9])
        ring, numbers = Ring(*given[9:]), refs.numbers
        pools = Pools(
            refs.k_pages, refs.v_pages, refs.block_tables, numbers[2], numbers[3], refs.scale[0]
        )

        @pl.loop(0, num_items(s, refs))
        def _(nth: jax.Array) -> None:
            item = item_at(s, refs, nth)
            tile, mine = item.tile, (item.head, item.tile.place)
            job = Job(
                row=tile.row,
                head=item.head,
                stored=tile.stored,
                history=tile.history,
                first_packed=tile.first_packed,
                walk=walk_of(s, tile, pools.window),
            )
            sums = fold.attend(t, pools, ring, job, refs.q.at[mine])
            fold.write(t, refs.o.at[mine], refs.lse.at[mine], *sums)

    window = jnp.asarray(0 if sliding_window is None else sliding_window, jnp.int32)
    layer = jnp.clip(jnp.asarray(layer, jnp.int32), 0, num_layers - 1)
    scale = jnp.asarray(sm_scale, jnp.float32).reshape(1)
    o, lse = plgpu.kernel(
        portable_prefill,
        out_type=(
            jax.ShapeDtypeStruct(packed.shape, q.dtype),
            jax.ShapeDtypeStruct(packed.shape[:3], jnp.float32),
        ),
        scratch_types=scratch(t),
        grid=(config.num_ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else dict(interpret=interpret)),
    )(
        packed,
        k_pages,
        v_pages,
        block_tables,
        tiles.fields,
        jnp.stack([tiles.count, tiles.heads_together, layer, positive(window)]),
        scale if soft_cap is not None else scale * LOG2E,
    )
    lse = jnp.where(lse < 0.5 * LOWEST, -jnp.inf, lse * LN2)
    return prefill_tiles.unpack(o, lse, tiles, tokens)
