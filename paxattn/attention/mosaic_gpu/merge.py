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
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
        o_parts: f32[S, V, Q].
        lse_parts: f32[S, Q], base 2.
        counts: i32[S], pieces of the unit whose first slot this is, else 0.
        out_dtype: of the merged `o`.
        interpret: parameters of the interpreter, or None.

    Returns:
        o [S, V, Q] and lse f32[S, Q], defined in the first slots only.
    """
    slots, dim_v, rows = o_parts.shape

    def merge_parts(o_ref: Any, lse_ref: Any, count_ref: Any, o_out: Any, lse_out: Any) -> None:
        slot, part = lax.axis_index("slot"), lax.axis_index("part")
        count = count_ref[slot]
        place = pl.ds(part * _COLUMNS, _COLUMNS)

        def some(i: jax.Array, carry: tuple) -> tuple:
            top, total, acc = carry
            lses, os = [], []
            for j in range(_AT_A_TIME):
                n = i * _AT_A_TIME + j
                at = slot + jnp.minimum(n, count - 1)
                lse = load(lse_ref.at[at], plgpu.Layout.WGMMA.reduce(0))
                lses.append(lse + jnp.where(n < count, 0.0, -jnp.inf))
                os.append(load(o_ref.at[at, place], plgpu.Layout.WGMMA))
            for lse, o in zip(lses, os, strict=True):
                new_top = jnp.maximum(top, lse)
                decay, weight = jnp.exp2(top - new_top), jnp.exp2(lse - new_top)
                acc = acc * across(decay, acc.shape, 1) + o * across(weight, acc.shape, 1)
                top, total = new_top, total * decay + weight
            return top, total, acc

        @pl.when(count > 0)
        def _() -> None:
            columns, full = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA
            start = (
                plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), columns),
                plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), columns),
                plgpu.layout_cast(jnp.zeros((_COLUMNS, rows), jnp.float32), full),
            )
            steps = lax.div(count + (_AT_A_TIME - 1), jnp.int32(_AT_A_TIME))
            top, total, acc = lax.fori_loop(0, steps, some, start)
            o = (acc * across(1.0 / total, acc.shape, 1)).astype(o_out.dtype)
            store(o_out.at[slot, place], o)

            @pl.when(part == 0)
            def _() -> None:
                store(lse_out.at[slot], top + jnp.log2(total))

    return plgpu.kernel(
        merge_parts,
        out_type=(
            jax.ShapeDtypeStruct(o_parts.shape, out_dtype),
            jax.ShapeDtypeStruct(lse_parts.shape, jnp.float32),
        ),
        grid=(slots, dim_v // _COLUMNS),
        grid_names=("slot", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else dict(interpret=interpret)),
    )(o_parts, lse_parts, counts)
