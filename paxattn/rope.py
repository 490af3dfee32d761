"""Rotary position embedding: frequencies, angles and the rotation itself.

Computed in float32 whatever the dtype of the model: at position 100,000 a bf16 angle is off by
hundreds of turns. The halves of a head are rotated against each other (element ``i`` with element
``i + head_dim / 2``), as Hugging Face checkpoints are stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions become angles. Static data: plain numbers, hashable, not a pytree.

    Attributes:
        theta: base of the geometric series of wavelengths (Su et al. 2021, arXiv:2104.09864).
        kind: ``"default"``; ``"linear"`` (position interpolation, Chen et al. 2023,
            arXiv:2306.15595); ``"llama3"`` (Llama 3.1's) or ``"yarn"`` (Peng et al. 2023,
            arXiv:2309.00071): long wavelengths are stretched, short ones kept, those between
            blended, by frequency (``llama3``) or by their place in the head (``yarn``).
        factor: how much ``linear`` stretches all, and the last two kinds the long wavelengths.
        low_freq_factor: of the last two kinds: wavelengths above ``original_max_positions /
            low_freq_factor`` are stretched in full.
        high_freq_factor: those below ``original_max_positions / high_freq_factor`` are kept
            (``llama3``: 1 and 4; ``yarn``, which calls the two beta_slow and beta_fast: 1 and 32).
        original_max_positions: context length before stretching, in tokens.
        truncate: ``yarn``: the blended part is widened to whole elements.
        attention_factor: on cosines and sines. None: ``0.1 ln(factor) + 1`` for ``yarn``, else 1.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(
                f"rope kind={self.kind!r} is not known; known: {', '.join(ROPE_KINDS)}"
            )
        if not self.theta > 0 or not self.factor > 0:
            raise ValueError(f"rope theta={self.theta} and factor={self.factor} must be positive")
        if self.kind in ("llama3", "yarn") and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope low_freq_factor={self.low_freq_factor} must be positive and below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.original_max_positions < 1:
            raise ValueError(f"rope {self.original_max_positions=} must be positive")
        if self.kind == "yarn" and not self.theta > 1:
            raise ValueError(f"rope theta={self.theta} must be above 1 for kind='yarn'")
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ValueError(f"rope attention_factor={self.attention_factor} must be positive")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position, f32[head_dim / 2].

        Raises:
            ValueError: ``head_dim`` is odd.
        """
        if head_dim % 2:
            raise ValueError(f"{head_dim=} must be even: rotary embedding rotates pairs")
        freqs = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            freqs = freqs / self.factor
        elif self.kind == "llama3":
            turns = self.original_max_positions * freqs / (2 * math.pi)  # over the old context
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(keep, 0.0, 1.0)
            freqs = keep * freqs + (1 - keep) * freqs / self.factor
        elif self.kind == "yarn":
            first, last = (
                self._element_of(turns, head_dim)
                for turns in (self.high_freq_factor, self.low_freq_factor)
            )
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            width = last - first or 0.001  # (as in every implementation: no division by zero)
            stretch = np.clip((np.arange(head_dim // 2) - first) / width, 0.0, 1.0)
            freqs = (1 - stretch) * freqs + stretch * freqs / self.factor
        return freqs.astype(np.float32)

    def _element_of(self, turns: float, head_dim: int) -> float:
        """Which pair of elements turns so often over the old context (a fraction of an index)."""
        radians = 2 * math.pi * turns / self.original_max_positions
        return -head_dim * math.log(radians) / (2 * math.log(self.theta))

    def angles(self, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines for `rotate`, shared by all layers of a step.

        Args:
            positions: i32[T], tokens' places in their sequences.
            head_dim: elements per head.

        Returns:
            (cos, sin), f32[T, head_dim / 2] each.
        """
        radians = positions.astype(jnp.float32)[:, None] * self.frequencies(head_dim)
        factor = self.attention_factor
        if factor is None:
            factor = 0.1 * math.log(max(self.factor, 1.0)) + 1 if self.kind == "yarn" else 1.0
        cos, sin = jnp.cos(radians), jnp.sin(radians)
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotate heads ``x[T, H, head_dim]`` that stand at ``positions[T]``; keeps x's dtype."""
        return rotate(x, *self.angles(positions, x.shape[-1]))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate heads by given angles.

    Args:
        x: ``[T, H, head_dim]``.
        cos: f32[T, head_dim / 2], from `Rope.angles`.
        sin: the same.

    Returns:
        ``[T, H, head_dim]`` in x's dtype.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
