"""Merges the partial results of units that the schedule cut into pieces, by log-sum-exp, in f32.

A unit's pieces lie in consecutive slots. One thread block per slot and 64 columns of V: that of a
unit's first slot does the merging, the others have nothing to do. The order of the sums is that of
the pieces, always. Letters as in `decode.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from paxattn.attention.mosaic_gpu.common import LOWEST, across, load, store

_COLUMNS = 64
_AT_A_TIME = 4  # pieces whose loads are in flight together


def merge(
    o_parts: jax.Array,
    lse_parts: jax.Array,
    counts: jax.Array,
    *,
    out_dtype: Any,
    interpret: Any = None,
    layout: Any = plgpu.Layout.WGMMA,
    columns: int = _COLUMNS,
    by_rows: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
        o_parts: f32[S, V, Q], or with `by_rows` f32[S, Q, V].
        lse_parts: f32[S, Q], base 2.
        counts: i32[S], pieces of the unit whose first slot this is, else 0.
        out_dtype: of the merged `o`.
        interpret: parameters of the interpreter, or None.
        layout: of part of one piece's `o` in registers.
        columns: of V that such a part has.
        by_rows: whether V is the last axis.

    Returns:
        o as `o_parts` and lse f32[S, Q], defined in the first slots only.
    """
    slots, dim_v, rows = o_parts.shape
    if by_rows:
        rows, dim_v = dim_v, rows
    per_row, axis = layout.reduce(int(by_rows)), int(not by_rows)

    def merge_parts(o_ref: Any, lse_ref: Any, count_ref: Any, o_out: Any, lse_out: Any) -> None:
        slot, part = lax.axis_index("slot"), lax.axis_index("part")
        count = count_ref[slot]
        some_columns = pl.ds(part * columns, columns)
        place = (slice(None), some_columns) if by_rows else (some_columns,)

        def some(i: jax.Array, carry: tuple) -> tuple:
            top, total, acc = carry
            lses, os = [], []
            for j in range(_AT_A_TIME):
                n = i * _AT_A_TIME + j
                at = slot + jnp.minimum(n, count - 1)
                lse = load(lse_ref.at[at], per_row)
                lses.append(lse + jnp.where(n < count, 0.0, -jnp.inf))
                os.append(load(o_ref.at[(at, *place)], layout))
            for lse, o in zip(lses, os, strict=True):
                new_top = jnp.maximum(top, lse)
                decay, weight = jnp.exp2(top - new_top), jnp.exp2(lse - new_top)
                acc = acc * across(decay, acc.shape, axis) + o * across(weight, acc.shape, axis)
                top, total = new_top, total * decay + weight
            return top, total, acc

        @pl.when(count > 0)
        def _() -> None:
            shape = (rows, columns) if by_rows else (columns, rows)
            start = (
                plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), per_row),
                plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), per_row),
                plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout),
            )
            steps = lax.div(count + (_AT_A_TIME - 1), jnp.int32(_AT_A_TIME))
            top, total, acc = lax.fori_loop(0, steps, some, start)
            o = (acc * across(1.0 / total, acc.shape, axis)).astype(o_out.dtype)
            store(o_out.at[(slot, *place)], o)

            @pl.when(part == 0)
            def _() -> None:
                store(lse_out.at[slot], top + jnp.log2(total))

    return plgpu.kernel(
        merge_parts,
        out_type=(
            jax.ShapeDtypeStruct(o_parts.shape, out_dtype),
            jax.ShapeDtypeStruct(lse_parts.shape, jnp.float32),
        ),
        # (The last axis is CUDA's first, the only one that can have more than 65,535 blocks.)
        grid=(dim_v // columns, slots),
        grid_names=("part", "slot"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else dict(interpret=interpret)),
    )(o_parts, lse_parts, counts)
