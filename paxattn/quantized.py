"""What pages may hold: floats as they are, or 8-bit numbers with a scale for each token and head.

A quantised number stands for ``number * scale``. The scale of a token's K (or V) of one head is its
largest magnitude over the largest number of the format, so that neither end of the range is lost
and a token's numbers never depend on another's: pages may be appended to, copied, shared, cut and
left behind without touching what they hold. That is also what a kernel can afford: the scale of a
key goes to a column of scores and that of a value to a column of probabilities (so does the decode
kernel for Hopper), or each to a row of numbers as these are widened (so do the other kernels).
Scales are bf16, the exponents of f32 in half of its bytes; numbers are divided by the scale as it
was rounded, so that its rounding costs nothing. With them a token of a head takes 66 bytes instead
of the 128 of bf16 (head_dim 64; 130 instead of 256 for 128): 1.94 (1.97) times as many tokens.

The choice was measured with the bundled checkpoint's own keys and values on files that it was not
trained on (`benchmarks/quantized_pages.py`; results beside it): relative root mean square errors of
what is stored and of what attention makes of it, and what they add to the held-out loss. Pages of
16 tokens; a scale for a page or a channel is that of a full page, which knows all its tokens.

    numbers   a scale for each            keys     values   attention   loss
    int8      token and head              0.83 %   0.58 %   0.90 %      +0.007 %
    int8      page and head               1.24 %   0.88 %   1.19 %      +0.001 %
    int8      channel of a page of keys   0.41 %   0.58 %   0.67 %      +0.002 %
    int8      token (all heads)           1.04 %   0.69 %   1.09 %      +0.010 %
    fp8       token and head              2.36 %   2.51 %   3.74 %      +0.011 %
    fp8       page and head               2.61 %   2.63 %   4.09 %      +0.012 %
    fp8       channel of a page of keys   2.33 %   2.51 %   3.62 %      -0.005 %
    fp8       token (all heads)           2.43 %   2.56 %   3.89 %      +0.034 %

Only a scale per channel (as KIVI has for keys, Liu et al., 2024) errs less, but it must be known
before the page is full, or the page be quantised anew with every token. Scales in f32 change the
third digit. Through the library itself, int8 pages cost 0.004 % of the loss with bf16 pages, fp8
pages 0.023 % (the worse of contexts of 512 and 2,048 tokens).

Numbers that are not finite: an infinity or a NaN makes the scale the same, and with it all of that
token's numbers of that head NaN, which attention then shows as it shows a NaN in float pages: in
the queries that see the token. All other tokens keep what they have. A token of zeros is a token of
zeros: scales never go below the smallest normal bf16.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

PAGE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
SCALE_DTYPE = np.dtype(jnp.bfloat16)
_LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
_ALSO = {"fp8": "float8_e4m3fn"}


def page_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of pages that a name, or a dtype, stands for; "fp8" is float8_e4m3fn.

    Raises:
        ValueError: pages cannot have it.
    """
    try:
        known = jnp.dtype(_ALSO.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    except TypeError:
        known = None
    if known is None or known.name not in PAGE_DTYPES:
        name = repr(dtype) if known is None else known.name
        raise ValueError(f"dtype={name} must be {', '.join(PAGE_DTYPES[:-1])} or {PAGE_DTYPES[-1]}")
    return known


def page_dtype_name(kv_dtype: DTypeLike | None) -> str | None:
    """What ``kv_dtype=`` asks for by its one name; None: nothing is asked.

    Raises:
        ValueError: pages cannot have it.
    """
    return None if kv_dtype is None else page_dtype(kv_dtype).name


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether pages of this dtype have scales."""
    return jnp.dtype(dtype).name in _LARGEST


def head_bytes(head_dim: int, dtype: DTypeLike) -> int:
    """Bytes that the K (or the V) of one token and head takes, its scale included."""
    size = head_dim * jnp.dtype(dtype).itemsize
    return size + SCALE_DTYPE.itemsize if is_quantized(dtype) else size


def quantize(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Turns K or V into the numbers and scales of pages.

    Args:
        x: ``[..., head_dim]``, any float dtype.
        dtype: float8_e4m3fn or int8.

    Returns:
        Numbers ``[..., head_dim]`` in that dtype, and scales bf16 ``[...]``.
    """
    largest = _LARGEST[jnp.dtype(dtype).name]
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / largest
    scales = jnp.maximum(scales, float(jnp.finfo(SCALE_DTYPE).tiny))
    # To bf16 and back would not do: XLA leaves both out, and divides by what is not stored.
    scales = lax.reduce_precision(scales, exponent_bits=8, mantissa_bits=7)
    # A scale that was rounded down leaves the largest number just beyond the format's.
    numbers = jnp.clip(wide / scales[..., None], -largest, largest)
    if jnp.issubdtype(dtype, jnp.integer):
        numbers = jnp.round(numbers)
    return numbers.astype(dtype), scales.astype(SCALE_DTYPE)


def dequantize(numbers: jax.Array, scales: jax.Array) -> jax.Array:
    """What numbers ``[..., head_dim]`` with scales ``[...]`` stand for, f32."""
    return numbers.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
