"""The portable decode kernel: items of a schedule, each a run of blocks of one (row, KV head).

The grid is persistent: `num_cores` thread blocks, each with its own list of items from
`schedule_decode`. A unit in one piece gives its final result; a piece of one gives f32 partial
results, o normalised, which `merge` joins.

Letters: R rows (sequences), H KV heads, Q packed query rows (new tokens x group, token-major,
padded to 16, 32 or 64), D head_dim, L layers, N pages, P `page_size`, M entries of a row's block
table, S slots for partial results.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from paxattn.attention import schedule as plan
from paxattn.attention.mosaic_gpu.common import LOG2E, reach
from paxattn.attention.mosaic_gpu.merge import merge
from paxattn.attention.mosaic_gpu.portable import fold
from paxattn.attention.mosaic_gpu.portable.ring import Job, Pools, Ring, Tile, scratch
from paxattn.attention.mosaic_gpu.prefill_work import Walk
from paxattn.attention.schedule import Schedule


def attend_units(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *scales: jax.Array,
    block_tables: jax.Array,
    stored: jax.Array | None,
    schedule: Schedule,
    layer: jax.Array,
    sliding_window: jax.Array | int | None,
    sm_scale: jax.Array,
    tile: Tile,
    num_cores: int,
    out_dtype: Any,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel, and merges what it did in pieces.

    Args:
        q: [R, H, Q, D].
        k_pages: [L, N, H, P, D].
        v_pages: same.
        *scales: of quantised K and V, [L, N, H, P] each.
        block_tables: i32[R, M].
        stored: i32[R], tokens that can be read, from `extent.readable`.
        schedule: from `schedule_decode`, for the same `block_kv`.
        layer: i32[], in range.
        sliding_window: i32[] (not positive: none), or None.
        sm_scale: f32[], factor on `q . k`.
        tile: what is static.
        num_cores: thread blocks.
        out_dtype: of `o`.
        interpret: parameters of the interpreter, or None.

    Returns:
        o [R, H, Q, D] and lse f32[R, H, Q] in base 2; undefined for units that have no items.
    """
    t, shape, slots = tile, jax.ShapeDtypeStruct, schedule.merge_counts.shape[0]

    def portable_decode(*refs: Any, ring: Ring) -> None:
        q, k, v, tables, items, core_items, stored, numbers, scale, *scales = refs[:-4]
        o, lse, o_parts, lse_parts = refs[-4:]
        core = lax.axis_index("core")
        pools = Pools(k, v, tables, numbers[0], numbers[1], scale[0], *scales)

        @pl.loop(core_items[core], core_items[core + 1])
        def _(i: jax.Array) -> None:
            item = [items[i, column] for column in range(plan.COLUMNS)]
            row, head, slot = item[plan.ROW], item[plan.HEAD], item[plan.SLOT]
            zero = jnp.int32(0)
            job = Job(
                row=row,
                head=head,
                stored=stored[row],
                history=item[plan.KV_LEN] - item[plan.Q_LEN],
                first_packed=zero,
                walk=Walk(item[plan.TOKEN], item[plan.BLOCKS], plain=zero, num_plain=zero),
            )
            sums = fold.attend(t, pools, ring, job, q.at[row, head])

            @pl.when(slot < 0)
            def _() -> None:
                fold.write(t, o.at[row, head], lse.at[row, head], *sums)

            @pl.when(slot >= 0)
            def _() -> None:
                fold.write(t, o_parts.at[slot], lse_parts.at[slot], *sums)

    scale = sm_scale if t.soft_cap is not None else sm_scale * LOG2E
    o, lse, o_parts, lse_parts = plgpu.kernel(
        portable_decode,
        out_type=(
            shape(q.shape, out_dtype),
            shape(q.shape[:3], jnp.float32),
            shape((slots, *q.shape[2:]), jnp.float32),
            shape((slots, t.rows), jnp.float32),
        ),
        scratch_types=dict(ring=scratch(t)),
        grid=(num_cores,),
        grid_names=("core",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else dict(interpret=interpret)),
    )(
        q,
        k_pages,
        v_pages,
        block_tables,
        schedule.items,
        schedule.core_items,
        stored,
        jnp.stack([layer, reach(sliding_window)]),
        scale.astype(jnp.float32).reshape(1),
        *scales,
    )
    parts = merge(
        o_parts, lse_parts, schedule.merge_counts, out_dtype=out_dtype, interpret=interpret,
        layout=fold.rows_layout(t.warps), columns=t.columns, by_rows=True,
    )  # fmt: skip
    slot = schedule.first_slots
    o = jnp.where((slot >= 0)[..., None, None], parts[0][slot], o)
    return o, jnp.where((slot >= 0)[..., None], parts[1][slot], lse)
