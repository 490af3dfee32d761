"""What else could have come in a token's place: the likeliest tokens and their log-probabilities.

Kept for requests that ask for them, of their latest tokens only: whoever runs steps reads them
before as many more tokens have come (an `Engine` does, after every block).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from paxattn.page_table.pages import when

MOST = 20  # in the place of one token, as in the OpenAI API


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TopLogprobs:
    """The likeliest tokens of Q requests, by place: that of the n-th generated one is ``n % C``.

    Attributes:
        tokens: i32[Q, C, MOST], the likeliest first; of a smaller vocabulary, zeros follow.
        logprobs: f32[Q, C, MOST].
    """

    tokens: jax.Array
    logprobs: jax.Array


def no_top_logprobs(num_requests: int, num_places: int) -> TopLogprobs:
    """Nothing known of Q requests, with room for C tokens of each."""
    shape = num_requests, num_places, MOST
    return TopLogprobs(tokens=jnp.zeros(shape, jnp.int32), logprobs=jnp.zeros(shape, jnp.float32))


def note(
    top: TopLogprobs, logits: jax.Array, requests: jax.Array, num_generated: jax.Array
) -> TopLogprobs:
    """Take down what was likeliest; costs nothing where nobody asks.

    Args:
        top: what is known.
        logits: f32[R, V], from which a token is chosen in every row.
        requests: i32[R], whose; Q or above: nobody's who asks.
        num_generated: i32[R], that token's number.
    """
    num_requests, num_places, _ = top.tokens.shape
    count = min(MOST, logits.shape[1])

    def take_down(tokens: jax.Array, logprobs: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = lax.top_k(jax.nn.log_softmax(logits), count)
        at = requests, num_generated % num_places, slice(count)
        return tokens.at[at].set(ids, mode="drop"), logprobs.at[at].set(values, mode="drop")

    asked = jnp.any(requests < num_requests)
    tokens, logprobs = when(asked, take_down, top.tokens, top.logprobs)
    return TopLogprobs(tokens=tokens, logprobs=logprobs)


@partial(jax.jit, static_argnames="count")
def latest(top: TopLogprobs, read: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
    """What came after ``read`` i32[Q] generated tokens: i32[Q, count, MOST] and f32[...]."""
    num_requests, num_places, _ = top.tokens.shape
    places = (read[:, None] + jnp.arange(count, dtype=jnp.int32)) % num_places
    lines = jnp.arange(num_requests)[:, None]
    return top.tokens[lines, places], top.logprobs[lines, places]
