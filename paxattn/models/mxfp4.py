"""MXFP4, the format of the released gpt-oss experts (OCP Microscaling Formats 1.0).

A block is 32 four-bit numbers (sign, two bits of exponent, one of mantissa), two to a byte with the
first in the low half, and one shared power of two, stored with 127 added.
"""

from __future__ import annotations

import numpy as np

BLOCK = 32  # elements that share a scale
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=-1)


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Unpack; exact, in bfloat16 too.

    Args:
        blocks: u8[..., G, 16], the numbers of G blocks.
        scales: u8[..., G], their exponents.

    Returns:
        f32[..., G * 32].
    """
    numbers = _PAIRS[blocks].reshape(*scales.shape, BLOCK)
    with np.errstate(over="ignore"):
        numbers = np.ldexp(numbers, scales.astype(np.int32)[..., None] - 127)
    return numbers.reshape(*scales.shape[:-1], -1)
