"""Plain decoding: run every row's newest token, sample the next, end and release rows.

The whole state of a generation is one pytree, `DecodeState`; a step is a pure function of it. It
begins where `step.prefill` ends, which stores all but the last token of each prompt and
computes no logits: that last token is a row's first decode step, so that several samples, beams or
guesses can start from one stored prompt. A row for which no page is left ends with
`Status.OUT_OF_PAGES`, and the other rows go on.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from paxattn.penalties import count_generated
from paxattn.pool import Pool, release_rows
from paxattn.sampling import LogitsProcessor, RowSampling, sample
from paxattn.step import (
    LanguageModel,
    PoolUse,
    first_only,
    left_alone,
    logits_of,
    ragged_step,
    shed,
    window_of,
)


class Status(enum.IntEnum):
    """What a row is doing, or why it ended."""

    EMPTY = 0
    RUNNING = 1
    STOP = 2
    LENGTH = 3
    OUT_OF_PAGES = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """A batch of R rows in generation (V: vocabulary, C: room for generated tokens).

    Attributes:
        pool: the pages and who owns them.
        status: i32[R], `Status` values.
        last_token: i32[R], the newest token of each row, whose KV is not yet in the cache.
        num_generated: i32[R], tokens generated so far.
        max_new_tokens: i32[R], at most C.
        stop_ids: i32[R, S], tokens that end a row, padded with -1.
        sampling: parameters per row.
        counts: i32[R, V], of the tokens in the row's sequence, see `penalties`.
        tokens: i32[R, C], the generated tokens; the first ``num_generated`` are valid.
        logprobs: f32[R, C], their log-probabilities under the model.
        use: how the pool was used.
    """

    pool: Pool
    status: jax.Array
    last_token: jax.Array
    num_generated: jax.Array
    max_new_tokens: jax.Array
    stop_ids: jax.Array
    sampling: RowSampling
    counts: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    use: PoolUse


def take_in(
    tokens: jax.Array,
    count: jax.Array,
    *,
    num_generated: jax.Array,
    max_new_tokens: jax.Array,
    stop_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """How many of some new tokens to take, and what a row is after them.

    Args:
        tokens: i32[R, m], new tokens of each row.
        count: i32[R], how many of them are new. What comes after a stop token or beyond
            ``max_new_tokens`` is left out.
        num_generated: i32[R], tokens before them.
        max_new_tokens: i32[R].
        stop_ids: i32[R, S], padded with -1.

    Returns:
        ``(count i32[R], status i32[R])``: ``RUNNING``, ``STOP`` or ``LENGTH``.
    """
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    count = jnp.minimum(count, max_new_tokens - num_generated)
    is_stop = jnp.any(tokens[..., None] == stop_ids[:, None], axis=-1)
    is_stop &= place < count[:, None]
    stopped = jnp.any(is_stop, axis=1)
    count = jnp.where(stopped, jnp.argmax(is_stop, axis=1).astype(jnp.int32) + 1, count)
    full = (count > 0) & (num_generated + count >= max_new_tokens)
    status = jnp.where(full, jnp.int32(Status.LENGTH), jnp.int32(Status.RUNNING))
    return count, jnp.where(stopped, jnp.int32(Status.STOP), status)


def record(
    model: LanguageModel,
    state: DecodeState,
    tokens: jax.Array,
    logprobs: jax.Array,
    count: jax.Array,
    *,
    failed: jax.Array,
    scrub: bool,
) -> DecodeState:
    """Take down new tokens, end the rows that are through, and give back what is not needed.

    Args:
        model: see `LanguageModel`; what its windows have left behind is given back.
        state: its pool is the one after the step.
        tokens: i32[R, m], new tokens of each row, see `take_in`.
        logprobs: f32[R, m].
        count: i32[R], how many of them are new.
        failed: bool[R], rows that found no page; only the first of them that needs one now ends.
        scrub: static; zero the pages that are given back before anyone can take them.
    """
    capacity = state.tokens.shape[1]
    rows = jnp.arange(state.status.size)[:, None]
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    count, after = take_in(
        tokens,
        count,
        num_generated=state.num_generated,
        max_new_tokens=state.max_new_tokens,
        stop_ids=state.stop_ids,
    )
    taken = place < count[:, None]
    index = jnp.where(taken, state.num_generated[:, None] + place, capacity)
    newest = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]

    status = jnp.where(after == Status.RUNNING, state.status, after)
    failed &= ~left_alone(state.pool.table)
    status = jnp.where(first_only(failed), jnp.int32(Status.OUT_OF_PAGES), status)
    ended = (state.status == Status.RUNNING) & (status != Status.RUNNING)
    pool = release_rows(state.pool, ended, scrub=scrub)
    return dataclasses.replace(
        state,
        pool=shed(model, pool, scrub=scrub),
        status=status,
        last_token=jnp.where(count > 0, newest, state.last_token),
        num_generated=state.num_generated + count,
        counts=count_generated(state.counts, tokens, taken),
        tokens=state.tokens.at[rows, index].set(tokens, mode="drop"),
        logprobs=state.logprobs.at[rows, index].set(logprobs, mode="drop"),
        use=state.use.after(state.pool.table, window_of(model)),
    )


def decode_step(
    model: LanguageModel,
    state: DecodeState,
    *,
    logits_processor: LogitsProcessor | None = None,
    scrub: bool = False,
) -> DecodeState:
    """Run every running row's newest token, and sample the next.

    Of the rows that find no page only the first ends: the pages that it gives back may let the
    others go on. Those are left as they were, for another step.

    Args:
        model: see `LanguageModel`.
        state: donate it to the enclosing jit.
        logits_processor: see `sampling.sample`.
        scrub: static; zero the pages that ended rows give back before anyone can take them.
    """
    live = state.status == Status.RUNNING
    pool, hidden, ok = ragged_step(
        model,
        state.pool,
        state.last_token,
        jnp.ones_like(state.status),
        live=live,
        max_q_len=1,
        scrub=scrub,
    )
    stepped = live & ok
    token, logprob = sample(
        logits_of(model, hidden),
        state.sampling,
        state.num_generated,
        lambda: state.counts,
        logits_processor,
    )
    return record(
        model,
        dataclasses.replace(state, pool=pool),
        token[:, None],
        logprob[:, None],
        stepped.astype(jnp.int32),
        failed=live & ~ok,
        scrub=scrub,
    )


def decode(
    model: LanguageModel,
    state: DecodeState,
    max_steps: jax.Array,
    *,
    logits_processor: LogitsProcessor | None = None,
    scrub: bool = False,
) -> DecodeState:
    """Generate until every row has ended, or for ``max_steps`` i32[] steps.

    Args:
        model: see `LanguageModel`.
        state: after `prefill`; donate it to the enclosing jit.
        max_steps: an upper bound, as data: streaming uses the same compiled loop.
        logits_processor: see `sampling.sample`.
        scrub: see `decode_step`.
    """
    last_step = state.use.num_steps + max_steps

    def more(state: DecodeState) -> jax.Array:
        return jnp.any(state.status == Status.RUNNING) & (state.use.num_steps < last_step)

    def body(state: DecodeState) -> DecodeState:
        return decode_step(model, state, logits_processor=logits_processor, scrub=scrub)

    return lax.while_loop(more, body, state)
