"""Launches the prefill kernels, which serve rows with many queries.

A row is cut into tiles of packed query rows, and a few tiles into pieces of the tokens they read
(see `prefill_tiles`). Either of two kernels serves them: that for Hopper (`prefill_kernel`), or the
portable one (`portable.prefill`).

The grid is persistent: CTA `c` of `C` works on items `c`, `2C - 1 - c`, `2C + c`, ... of the list
(each pass through the CTAs turns round, because a static deal of descending lengths in one
direction would give the first CTAs the longest tile every time). With `num_ctas` as large as the
list every item has a CTA of its own and the hardware deals.

Queries and results are tile-major, gathered before and scattered after by XLA: a TMA box of 8-row
tiles cannot start at any token, and nothing past a row's end may be written.

Letters: T tokens, R rows, M `max_pages_per_seq`, L layers, N pages, P `page_size`, D head_dim, Hq
and Hkv heads, G = Hq / Hkv, B tiles.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from paxattn.attention.mosaic_gpu import prefill_kernel, prefill_load, prefill_tiles
from paxattn.attention.mosaic_gpu.common import LN2, LOG2E, LOWEST, reach
from paxattn.attention.mosaic_gpu.portable import prefill as portable
from paxattn.attention.mosaic_gpu.portable import ring
from paxattn.attention.mosaic_gpu.portable.cards import Card
from paxattn.attention.mosaic_gpu.prefill_config import Config
from paxattn.attention.mosaic_gpu.prefill_tiles import Tiles
from paxattn.attention.mosaic_gpu.prefill_work import Static


def prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *scales: jax.Array,
    block_tables: jax.Array,
    cu_q_lens: jax.Array,
    layer: jax.Array | int,
    sm_scale: jax.Array | float,
    sliding_window: jax.Array | int | None,
    causal: bool,
    soft_cap: float | None,
    tiles: Tiles,
    config: Config,
    card: Card | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the rows of a ragged batch that were cut into tiles, without sinks.

    Arguments as `paged_attention_reference` has them, of requests that the kernel serves.

    Args:
        q: [T, Hq, D], bf16 or f16.
        k_pages: [L, N, Hkv, P, D], q's dtype or, with scales, float8_e4m3fn or int8.
        v_pages: same.
        *scales: of quantised K and V, bf16[L, N, Hkv, P] each.
        block_tables: i32[R, M]; what follows an entry that is no page is hidden.
        cu_q_lens: i32[R + 1].
        layer: i32[].
        sm_scale: positive factor on `q . k`.
        sliding_window: i32[] (not positive: none), or None, which makes a smaller kernel.
        causal: whether a query is blind to later positions.
        soft_cap: `cap * tanh(s / cap)` on scaled scores, or None.
        tiles: from `prefill_tiles.cut`, for the same window, of `config.max_rows`.
        config: block sizes.
        card: what the portable kernel runs on; None: that for Hopper serves.
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
        page_dtype=k_pages.dtype if scales else None,
    )
    smem: Any
    warpgroups: dict[str, Any] = {}
    if card is None:
        body, smem = prefill_kernel.kernel(s), prefill_load.scratch(s)
        warpgroups = dict(num_threads=prefill_kernel.warpgroups(s), thread_name="wg")
    else:
        t = portable.tile(s, tiles.size, max_pages=block_tables.shape[1], tma=card.tma)
        body, smem = portable.kernel(s, t), dict(ring=ring.scratch(t))
    layer = jnp.clip(jnp.asarray(layer, jnp.int32), 0, num_layers - 1)
    scale = jnp.asarray(sm_scale, jnp.float32).reshape(1)
    packed = prefill_tiles.pack_queries(q, tiles, cu_q_lens, num_kv_heads)
    found = num_kv_heads, tiles.most_pieces * packed.shape[1], tiles.size
    o, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((*found, head_dim), q.dtype),
            jax.ShapeDtypeStruct(found, jnp.float32),
        ),
        scratch_types=smem,
        grid=(s.config.num_ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **warpgroups,
        **({} if interpret is None else dict(interpret=interpret)),
    )(
        packed,
        k_pages,
        v_pages,
        block_tables,
        tiles.fields,
        jnp.stack([tiles.count, tiles.heads_together, layer, reach(sliding_window)]),
        scale if soft_cap is not None else scale * LOG2E,
        *scales,
    )
    if card is not None:  # (in base 2, and finite where nothing was seen)
        lse = jnp.where(lse < 0.5 * LOWEST, -jnp.inf, lse * LN2)
    return prefill_tiles.unpack(o, lse, tiles, tokens)
