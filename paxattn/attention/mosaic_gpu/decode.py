"""Launches the decode kernel: its grid, its shared memory, its operands. See `decode_kernel.py`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from paxattn.attention.mosaic_gpu.common import LOG2E, barriers, operand, reach
from paxattn.attention.mosaic_gpu.config import value_dim
from paxattn.attention.mosaic_gpu.decode_kernel import consume, produce
from paxattn.attention.mosaic_gpu.decode_refs import QUERY_TILES, Inputs, Outputs, Scratch, Tile
from paxattn.attention.schedule import Schedule
from paxattn.quantized import SCALE_DTYPE

_CONSUMER, _PRODUCER = 0, 1


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *scales: jax.Array,
    block_tables: jax.Array,
    schedule: Schedule,
    layer: jax.Array,
    sliding_window: jax.Array | int | None,
    sm_scale: jax.Array,
    tile: Tile,
    out_dtype: Any,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
        q: [R, H, Q, D].
        k_pages: [L, N, H, P, D].
        v_pages: same.
        *scales: of quantised K and V, [L, N, H, P] each.
        block_tables: i32[R, M].
        schedule: from `schedule_decode`, for the same `block_kv`.
        layer: i32[], in range.
        sliding_window: i32[] (not positive: none), or None.
        sm_scale: f32[], factor on `q . k`.
        tile: what is static.
        out_dtype: of `o`.
        interpret: parameters of the interpreter, or None.

    Returns:
        o [R, H, V, Q] and lse f32[R, H, Q] in base 2 (undefined for units that are in no or more
        pieces than one), and the pieces' [S, V, Q] and [S, Q] in f32 (undefined where unused).
    """
    t, config = tile, tile.config
    units, slots = q.shape[:2], schedule.merge_counts.shape[0]
    dim_v = value_dim(t.head_dim)
    shape = jax.ShapeDtypeStruct
    quantized = t.page_dtype is not None
    ring = functools.partial(operand, config.stages, config.block_kv, dtype=t.dtype)
    more: dict[str, Any] = {}
    if quantized:
        # (Narrow swizzles, so that parts of 64 columns can be read.)
        ring = functools.partial(ring, dtype=t.page_dtype, columns=64)
        for name in ("k_scales", "v_scales"):
            more[name] = plgpu.SMEM((config.stages, config.block_kv), SCALE_DTYPE)
        more["wide"] = operand(config.block_kv, t.head_dim, dtype=t.dtype)
    scratch = Scratch(
        q=operand(QUERY_TILES, t.rows, t.head_dim, dtype=t.dtype),
        k=ring(t.head_dim),
        v=ring(t.head_dim),
        p=operand(t.rows, config.block_kv, dtype=t.dtype, columns=t.head_dim),  # swizzled as V
        q_full=barriers(QUERY_TILES),
        q_free=barriers(QUERY_TILES),
        k_full=barriers(config.stages, arrivals=t.pages * (1 + t.num_scales)),
        k_free=barriers(config.stages),
        v_full=barriers(config.stages, arrivals=t.pages),
        v_free=barriers(config.stages),
        **more,
    )

    def paged_decode(*refs: Any) -> None:
        given = 8 + len(scales)
        x = Inputs(*refs[:given])
        out = Outputs(*refs[given : given + 4])
        s = Scratch(*refs[given + 4 :])
        core = lax.axis_index("core")
        first, last = x.core_items[core], x.core_items[core + 1]

        @pl.when(lax.axis_index("warpgroup") == _PRODUCER)
        def _() -> None:
            @plgpu.warp_map
            def _(warp: jax.Array) -> None:
                pl.when(warp == 0)(lambda: produce(x, s, first, last, t))

        @pl.when(lax.axis_index("warpgroup") == _CONSUMER)
        def _() -> None:
            consume(x, out, s, first, last, t)

    kernel = plgpu.kernel(
        paged_decode,
        out_type=(
            shape((*units, dim_v, t.rows), out_dtype),
            shape((*units, t.rows), jnp.float32),
            shape((slots, dim_v, t.rows), jnp.float32),
            shape((slots, t.rows), jnp.float32),
        ),
        scratch_types=[x for x in scratch if x is not None],
        grid=(config.num_cores,),
        grid_names=("core",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else dict(interpret=interpret)),
    )
    return kernel(
        q,
        k_pages,
        v_pages,
        block_tables,
        schedule.items,
        schedule.core_items,
        jnp.stack([layer, reach(sliding_window)]),
        (sm_scale * LOG2E).astype(jnp.float32).reshape(1),
        *scales,
    )
