"""Speculative decoding inside ``jax.jit``: guess several tokens, check them all in one ragged step.

A drafter guesses up to k tokens per row; the target runs the newest token and the guesses
together, so that it knows what it would have chosen after each; guesses are kept as long as they
are what it chose, and `page_table.truncate` gives back the rest. Leviathan et al. (2023,
https://arxiv.org/abs/2211.17192) keep the target's distribution by accepting a guess with
probability ``min(1, p / q)``. Here target and drafter draw with the *same* noise instead, the
Gumbel noise that plain decoding draws from ``(seed, tokens generated)``: the coupling of Daliri et
al. (2024, https://arxiv.org/abs/2408.07978). The tokens kept are thus the very tokens that plain
decoding yields, whatever the drafter: nothing is left to prove about their distribution, and a
seed means the same with and without speculation. For a drafter without randomness (`NGram`) the
chance of acceptance is the same, ``p(guess)``; for a sampled one it is at least ``(1 - d) / (1 +
d)``, with d the total variation distance of the two distributions, of at most ``1 - d``.

A matrix product of k + 1 tokens may round otherwise than one of a single token: where the two best
candidates differ by less than about 1e-4, speculation may choose the other one.

Shapes: R rows, k guesses, H tokens that a row can hold, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from paxattn import page_table
from paxattn.decode_step import DecodeState, Status, record
from paxattn.pool import Pool, make_room, with_table
from paxattn.sampling import LogitsProcessor, RowSampling, sample
from paxattn.step import LanguageModel, ragged_step


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NGram:
    """Guesses that what followed the latest tokens before will follow them again.

    Prompt lookup (Saxena, 2023): no model, no memory; good for text that repeats itself, such as
    edits of code.

    Attributes:
        num_tokens: k, guesses per step.
        longest: most tokens compared; of the places where as many as possible agree, the latest.
    """

    num_tokens: int = field(default=4, metadata={"static": True})
    longest: int = field(default=3, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DraftModel:
    """Guesses with a smaller model of the same vocabulary, which has its own pages.

    Attributes:
        model: see `step.LanguageModel`.
        num_tokens: k, guesses per step.
    """

    model: Any
    num_tokens: int = field(default=4, metadata={"static": True})


Drafter = NGram | DraftModel


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SpeculativeState:
    """A generation in progress, and what its drafter knows.

    Attributes:
        decode: the generation.
        history: i32[R, H], each row's tokens, prompt included; ``kv_lens + 1`` of them are valid.
        pool: the draft model's own (None for `NGram`).
        drafted: i32[], guesses made.
        accepted: i32[], guesses kept; ``accepted / drafted`` is the acceptance rate.
    """

    decode: DecodeState
    history: jax.Array
    pool: Pool | None
    drafted: jax.Array
    accepted: jax.Array


def propose_ngram(
    history: jax.Array, lens: jax.Array, *, num_tokens: int, longest: int
) -> tuple[jax.Array, jax.Array]:
    """Look the latest tokens up in what came before.

    Args:
        history: i32[R, H].
        lens: i32[R], valid tokens.
        num_tokens: k.
        longest: most tokens to compare.

    Returns:
        Guesses i32[R, k], and how many of them there are, i32[R].
    """
    size = history.shape[1]
    end = jnp.arange(1, size + 1)  # one past the last of the tokens compared
    agree = jnp.broadcast_to(end < lens[:, None], history.shape)
    best = jnp.zeros_like(lens)
    for back in range(longest):
        latest = jnp.take_along_axis(history, jnp.maximum(lens - 1 - back, 0)[:, None], axis=1)
        shifted = jnp.pad(history, ((0, 0), (back, 0)), constant_values=-1)[:, :size]
        agree &= shifted == latest
        found = jnp.max(jnp.where(agree, end, 0), axis=1).astype(lens.dtype)
        best = jnp.where(found > 0, found, best)
    index = jnp.minimum(best[:, None] + jnp.arange(num_tokens), size - 1)
    count = jnp.where(best > 0, jnp.minimum(lens - best, num_tokens), 0)
    return jnp.take_along_axis(history, index, axis=1), count


def _propose_model(
    drafter: DraftModel,
    state: SpeculativeState,
    live: jax.Array,
    limit: jax.Array,
    logits_processor: LogitsProcessor | None,
    scrub: bool,
) -> tuple[SpeculativeState, jax.Array, jax.Array]:
    """Run the draft model for up to ``limit[R]`` guesses, and once more to store the last one.

    A row whose draft pages have fallen behind (none was free) gets no guesses any more.
    """
    decode = state.decode
    if state.pool is None:
        raise ValueError("a DraftModel needs a pool of its own in the state")
    live &= state.pool.table.kv_lens == decode.pool.table.kv_lens
    limit = jnp.where(live, limit, -1)

    def step(carry: tuple, i: jax.Array) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        pool, token, seen, fine = carry
        pool, hidden, ok = ragged_step(
            drafter.model, pool, token, jnp.ones_like(token),
            live=fine & (i <= limit), max_q_len=1, scrub=scrub,
        )  # fmt: skip
        seen = seen.at[jnp.arange(token.size), token].set(True)
        token, _ = sample(
            drafter.model.logits(hidden), decode.sampling, decode.num_generated + i, seen,
            logits_processor,
        )  # fmt: skip
        return (pool, token, seen, fine & ok), (token, fine & ok)

    carry = (state.pool, decode.last_token, decode.seen, live)
    carry, (guesses, fine) = lax.scan(step, carry, jnp.arange(drafter.num_tokens + 1))
    # A guess counts if every feed up to the one that stores it went well.
    stored = jnp.sum(fine[1:], axis=0, dtype=jnp.int32)
    state = dataclasses.replace(state, pool=carry[0])
    return state, guesses[:-1].T, jnp.clip(jnp.minimum(stored, limit), 0)


def _choose(
    model: LanguageModel,
    decode: DecodeState,
    hidden: jax.Array,
    candidates: jax.Array,
    rows: jax.Array,
    offsets: jax.Array,
    logits_processor: LogitsProcessor | None,
) -> tuple[jax.Array, jax.Array]:
    """What plain decoding would choose after each packed token: tokens i32[T], logprobs f32[T]."""
    # The repetition penalty after a guess counts it and those before it.
    upto = jnp.arange(candidates.shape[1]) <= offsets[:, None]
    at = jnp.where(upto, candidates[rows], decode.seen.shape[1])
    seen = decode.seen[rows].at[jnp.arange(rows.size)[:, None], at].set(True, mode="drop")
    sampling: RowSampling = jax.tree.map(lambda x: x[rows], decode.sampling)
    return sample(
        model.logits(hidden), sampling, decode.num_generated[rows] + offsets, seen, logits_processor
    )


def speculative_step(
    model: LanguageModel,
    drafter: Drafter,
    state: SpeculativeState,
    *,
    logits_processor: LogitsProcessor | None = None,
    scrub: bool = False,
) -> SpeculativeState:
    """Guess, check, keep: every running row gains between 1 and k + 1 tokens.

    Where pages are too few for the guesses, a row goes on without them; only where they are too few
    for its next token does it end, as in `decode_step.decode_step`.

    Args:
        model: the target, see `LanguageModel`.
        drafter: who guesses.
        state: donate it to the enclosing jit.
        logits_processor: see `sampling.sample`.
        scrub: see `decode_step.decode_step`.
    """
    k = drafter.num_tokens
    decode = state.decode
    live = decode.status == Status.RUNNING
    lens = decode.pool.table.kv_lens
    limit = jnp.minimum(k, decode.max_new_tokens - decode.num_generated - 1)
    if isinstance(drafter, NGram):
        guesses, count = propose_ngram(
            state.history, lens + 1, num_tokens=k, longest=drafter.longest
        )
        count = jnp.minimum(count, limit)
    else:
        state, guesses, count = _propose_model(drafter, state, live, limit, logits_processor, scrub)

    wanted = jnp.where(live, count + 1, 0)
    pool, ok = make_room(decode.pool, wanted, max_new_tokens=k + 1, scrub=scrub)
    count = jnp.where(live & ok, count, 0)
    q_lens = jnp.where(live, count + 1, 0)
    num_tokens = lens.size * (k + 1)
    rows, offsets, active = page_table.token_rows(q_lens, num_tokens)
    candidates = jnp.concatenate([decode.last_token[:, None], guesses], axis=1)
    tokens = jnp.where(active, candidates[rows, offsets], 0)
    pool, hidden, ok = ragged_step(
        model, pool, tokens, q_lens, live=live, max_q_len=k + 1, scrub=scrub
    )
    token, logprob = _choose(model, decode, hidden, candidates, rows, offsets, logits_processor)
    place = (jnp.where(active, rows, lens.size), offsets)
    chosen = jnp.zeros_like(candidates).at[place].set(token, mode="drop")
    logprobs = jnp.zeros(candidates.shape, jnp.float32).at[place].set(logprob, mode="drop")

    right = (guesses == chosen[:, :-1]) & (jnp.arange(k) < count[:, None])
    kept = jnp.sum(jnp.cumprod(right, axis=1), axis=1, dtype=jnp.int32)
    gained = jnp.where(live & ok, kept + 1, 0)
    table, _ = page_table.truncate(pool.table, jnp.where(live & ok, lens + gained, -1))
    pool = with_table(pool, table, scrub=scrub)
    # What the cache now holds of each row: the newest token and the guesses kept.
    stored = jnp.where(jnp.arange(k + 1) < gained[:, None], candidates, decode.seen.shape[1])
    seen = decode.seen.at[jnp.arange(lens.size)[:, None], stored].set(True, mode="drop")
    at = jnp.where(jnp.arange(k + 1) < gained[:, None], lens[:, None] + 1 + jnp.arange(k + 1), -1)
    at = jnp.where(at >= 0, at, state.history.shape[1])
    history = state.history.at[jnp.arange(lens.size)[:, None], at].set(chosen, mode="drop")
    decode = record(
        dataclasses.replace(decode, pool=pool, seen=seen),
        chosen,
        logprobs,
        gained,
        failed=live & ~ok,
        scrub=scrub,
    )
    own = state.pool
    if own is not None:
        running = decode.status == Status.RUNNING
        lens = jnp.where(running, jnp.minimum(lens + gained, own.table.kv_lens), 0)
        own = with_table(own, page_table.truncate(own.table, lens)[0], scrub=scrub)
    return dataclasses.replace(
        state,
        decode=decode,
        history=history,
        pool=own,
        drafted=state.drafted + jnp.sum(jnp.where(live & ok, count, 0)),
        accepted=state.accepted + jnp.sum(jnp.where(live & ok, kept, 0)),
    )


def speculate(
    model: LanguageModel,
    drafter: Drafter,
    state: SpeculativeState,
    max_steps: jax.Array,
    *,
    logits_processor: LogitsProcessor | None = None,
    scrub: bool = False,
) -> SpeculativeState:
    """Generate until every row has ended, or for ``max_steps`` i32[] steps, in one while loop.

    Args:
        model: the target.
        drafter: who guesses.
        state: after `step.prefill` of both models; donate it to the enclosing jit.
        max_steps: an upper bound, as data.
        logits_processor: see `sampling.sample`.
        scrub: see `speculative_step`.
    """
    last_step = state.decode.use.num_steps + max_steps

    def more(state: SpeculativeState) -> jax.Array:
        running = jnp.any(state.decode.status == Status.RUNNING)
        return running & (state.decode.use.num_steps < last_step)

    def body(state: SpeculativeState) -> SpeculativeState:
        return speculative_step(
            model, drafter, state, logits_processor=logits_processor, scrub=scrub
        )

    return lax.while_loop(more, body, state)
