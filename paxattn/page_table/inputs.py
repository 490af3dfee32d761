"""Checks of arguments that are visible while tracing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

INT32_MAX = 2**31 - 1


def check_positive(name: str, value: int) -> int:
    """A static size, at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    return int(value)


def as_integers(name: str, value: ArrayLike, shape: tuple[int, ...] | None) -> Array:
    """Converts to int32 and checks the shape; None: any one axis."""
    if isinstance(value, Array | np.ndarray | np.integer) and value.dtype in (np.int64, np.uint64):
        # Numbers that are out of range stay so: their low 32 bits might not be.
        value = value.clip(max(np.iinfo(value.dtype).min, -INT32_MAX - 1), INT32_MAX)
    array = _as_array(name, value, "integers (of 32 bits)")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    if array.ndim != 1 if shape is None else array.shape != shape:
        wanted = "one axis" if shape is None else f"shape {shape}"
        raise ValueError(f"{name} has shape {array.shape}, expected {wanted}")
    return array.astype(jnp.int32)


def _as_array(name: str, value: ArrayLike, what: str) -> Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be {what}, got {value!r}") from None


def as_mask(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Checks that a value is booleans of that shape."""
    array = _as_array(name, value, "booleans")
    if array.dtype != jnp.bool_:
        raise ValueError(f"{name} must be booleans, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    return array
