"""What the Mosaic GPU kernels share: layouts of shared memory, and small idioms.

Matrix operands lie in shared memory in tiles of 8 rows by one swizzle span of columns, as TMA
writes and `wgmma` reads them without bank conflicts. Softmax works in base 2 (`exp2` is what the
hardware has), so scores are scaled by `log2(e)` beforehand.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
# Stands in for -inf as a running maximum: differences of it are finite, so that a tile which has
# seen nothing yet needs no special case.
LOWEST = -1e38


def reach(sliding_window: jax.Array | int | None) -> jax.Array:
    """The window as i32[], positive: none is one without end (differences must not overflow)."""
    window = jnp.asarray(0 if sliding_window is None else sliding_window, jnp.int32)
    return jnp.where(window > 0, window, 2**30)


def operand(*shape: int, dtype: Any, columns: int | None = None) -> Any:
    """Shared memory for matrices that TMA writes or `wgmma` reads.

    Args:
        *shape: the last two are rows (a multiple of 8) and columns.
        dtype: 16-bit.
        columns: of the other operand of the product, if they are not this one's: both must have
            the same swizzle.

    Returns:
        The scratch type, in the widest swizzle that the columns allow.
    """
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle((columns or shape[-1]) * bits)
    transforms = (
        plgpu.TilingTransform((8, swizzle * 8 // bits)),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


# jax 0.10 wants an index, 0.11 warns of it, and later ones have none.
_INDEX = [()] if jax.__version_info__ < (0, 11) else []


def load(ref: Any, layout: Any) -> jax.Array:
    """Reads all of a reference into registers, in a layout."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)


def store(ref: Any, value: jax.Array) -> None:
    """Writes all of a reference, in the layout that the value has.

    Rows of a few queries are less than a cache line, and transposed ones meet in a bank: what jax
    0.12 calls not optimized, and refuses unless told.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def widen(ref: Any, dtype: Any) -> jax.Array:
    """Reads quantised numbers as 16-bit floats, in the layout of a product's operand."""
    narrow = load(ref, plgpu.Layout.WGMMA_UPCAST_2X)
    return plgpu.layout_cast(narrow.astype(dtype), plgpu.Layout.WGMMA)


def narrow_operand(*shape: int, dtype: Any) -> Any:
    """Shared memory for what `widen_rows` reads: tiles of as many columns as an `operand` has."""
    return operand(*shape, dtype=dtype, columns=plgpu.find_swizzle(shape[-1] * 16) // 2)


def copy_layout(rows: int, columns: int, swizzle: int | None = None) -> Any:
    """The layout in which a warpgroup moves a 16-bit operand, 16 bytes at a time and thread."""
    swizzle = swizzle or plgpu.find_swizzle(columns * 16)
    return plgpu.Layout.SMEM_GMEM_COPY((rows, columns), jnp.bfloat16, swizzle)


def widen_rows(numbers: Any, scales: jax.Array, wide: Any, layout: Any) -> None:
    """Multiplies quantised numbers by a scale for each row, rounded to 16 bits.

    Args:
        numbers: reference to [X, D], fp8 or int8.
        scales: [X], in the layout's `reduce(1)`.
        wide: reference to write, [X, D].
        layout: from `copy_layout`.
    """
    factors = across(scales.astype(jnp.float32), wide.shape, 0)
    store(wide, (load(numbers, layout).astype(jnp.float32) * factors).astype(wide.dtype))


def load_scales(ref: Any) -> jax.Array:
    """Reads a scale per token, f32[B]: one for each row of an accumulator."""
    return load(ref, plgpu.Layout.WGMMA.reduce(1)).astype(jnp.float32)


def fetch(source: Any, target: Any, there: Any) -> None:
    """Asks TMA for a page, or for its scales, which lie in the pool as they are copied.

    The promise (page numbers are clamped) makes of scales, which have no swizzle, a plain bulk copy
    to any multiple of 16 bytes. As a box of a tensor they could only go to multiples of 128, and a
    page's scales are fewer: anywhere else the kernel dies of a misaligned address.
    """
    plgpu.copy_gmem_to_smem(source, target, there, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def barriers(count: int, arrivals: int = 1) -> Any:
    """An array of barriers (jax 0.10 and 0.11 differ on what no number means)."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def across(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Spreads a vector along the other axis of `shape`: it has one number per place of `axis`."""
    return jax.lax.broadcast_in_dim(x, shape, (axis,))


def capped(s: jax.Array, cap: float) -> jax.Array:
    """`cap * tanh(s / cap)`, by `exp2`: the hardware's own `tanh` keeps 11 bits only."""
    return cap - (2.0 * cap) / (1.0 + jnp.exp2(s * (2.0 * LOG2E / cap)))
