"""Guessing without a model: what followed the latest tokens before will follow them again."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from paxattn.tree import Tree, comb


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NGram:
    """Guesses that what followed the latest tokens before will follow them again.

    Prompt lookup (Saxena, 2023): no model, no memory; good for text that repeats itself, such as
    edits of code.

    Attributes:
        num_tokens: k, guesses per step.
        longest: most tokens compared; of the places where as many as possible agree, the latest.
        branches: follow so many such places, which went on differently, at once: a tree of as many
            chains of k guesses, checked in one step.
    """

    num_tokens: int = field(default=4, metadata={"static": True})
    longest: int = field(default=3, metadata={"static": True})
    branches: int = field(default=1, metadata={"static": True})

    @property
    def tree(self) -> Tree:
        """How the guesses hang together."""
        return comb(self.num_tokens, self.branches)


def propose_ngram(
    history: jax.Array, lens: jax.Array, *, num_tokens: int, longest: int, branches: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Look the latest tokens up in what came before.

    Args:
        history: i32[R, H].
        lens: i32[R], valid tokens.
        num_tokens: k.
        longest: most tokens to compare.
        branches: b, most places to follow: the best one, then the best of those whose next token
            is another one, and so on.

    Returns:
        Guesses i32[R, k, b], -1 where there is none, and the length of the longest chain i32[R].
    """
    size = history.shape[1]
    end = jnp.arange(1, size + 1, dtype=lens.dtype)  # one past the last of the tokens compared
    agree = jnp.broadcast_to(end < lens[:, None], history.shape)
    best = jnp.zeros_like(lens, shape=history.shape)
    for back in range(longest):
        latest = jnp.take_along_axis(history, jnp.maximum(lens - 1 - back, 0)[:, None], axis=1)
        shifted = jnp.pad(history, ((0, 0), (back, 0)), constant_values=-1)[:, :size]
        agree &= shifted == latest
        best += agree
    score = jnp.where(best > 0, best * size + end - 1, 0)  # longer first, then later
    following = jnp.pad(history, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
    place = jnp.arange(num_tokens, dtype=lens.dtype)
    chains, most = [], jnp.zeros_like(lens)
    for _ in range(branches):
        top = jnp.max(score, axis=1)
        at = top % size + 1
        count = jnp.where(top > 0, jnp.minimum(lens - at, num_tokens), 0)
        index = jnp.minimum(at[:, None] + place, size - 1)
        chain = jnp.take_along_axis(history, index, axis=1)
        chains.append(jnp.where(place < count[:, None], chain, -1))
        most = jnp.maximum(most, count)
        score = jnp.where(following == chain[:, :1], 0, score)
    return jnp.stack(chains, axis=2), most
