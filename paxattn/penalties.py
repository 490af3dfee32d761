"""Penalties on tokens that a sequence holds already: for repetition, frequency and presence.

They go by counts i32[n, V], a line for each sequence and a column for each token of the vocabulary:
twice the times that it was generated, plus one if the prompt holds it. One array and one update for
three penalties, of which one looks at prompts and the others do not.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp


class Penalties(Protocol):
    """The parameters read here; see `sampling.SamplingParams`."""

    @property
    def repetition_penalty(self) -> jax.Array:
        """f32[n]."""

    @property
    def frequency_penalty(self) -> jax.Array:
        """f32[n]."""

    @property
    def presence_penalty(self) -> jax.Array:
        """f32[n]."""


def count_tokens(
    tokens: jax.Array, prompt_lens: jax.Array, lens: jax.Array, vocab_size: int
) -> jax.Array:
    """Counts of sequences that lie in lines.

    Args:
        tokens: i32[n, L], the first ``lens`` of a line are valid.
        prompt_lens: i32[n], tokens of it that are prompt.
        lens: i32[n].
        vocab_size: V.

    Returns:
        i32[n, V].
    """
    lines, place = jnp.arange(lens.size)[:, None], jnp.arange(tokens.shape[1], dtype=jnp.int32)
    in_prompt = place < jnp.minimum(prompt_lens, lens)[:, None]
    prompt = jnp.where(in_prompt, tokens, vocab_size)
    counts = jnp.zeros((lens.size, vocab_size), jnp.int32).at[lines, prompt].set(1, mode="drop")
    return count_generated(counts, tokens, ~in_prompt & (place < lens[:, None]))


def count_generated(counts: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Counts after more generated tokens.

    Args:
        counts: i32[n, V].
        tokens: i32[n, m].
        mask: bool[n, m], which of them count.
    """
    lines, vocab_size = jnp.arange(counts.shape[0])[:, None], counts.shape[1]
    return counts.at[lines, jnp.where(mask, tokens, vocab_size)].add(2, mode="drop")


def any_penalty(params: Penalties) -> jax.Array:
    """Whether any line has one, bool[]."""
    return jnp.any(
        (params.repetition_penalty != 1.0)
        | (params.frequency_penalty != 0.0)
        | (params.presence_penalty != 0.0)
    )


def penalize(logits: jax.Array, counts: jax.Array, params: Penalties) -> jax.Array:
    """Apply them, in this order: repetition, frequency, presence.

    The first is of Keskar et al., 2019 (arXiv:1909.05858), as transformers has it; the others are
    those of the OpenAI API.

    Args:
        logits: f32[n, V].
        counts: i32[n, V].
        params: for each line.

    Returns:
        f32[n, V].
    """
    factor, frequency, presence = (
        penalty[:, None]
        for penalty in (
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )
    )
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(counts > 0, repeated, logits)
    times = (counts >> 1).astype(logits.dtype)
    return logits - frequency * times - presence * jnp.minimum(times, 1)
