"""Beam search inside ``jax.jit``: beams are rows that share pages, moved by one table step.

Every prompt owns `num_beams` neighbouring rows of the page table. A step runs the beams' newest
tokens, adds the log-probabilities to the beams' scores, keeps the best continuations, and makes
each row a fork of the row that its beam grew from (`page_table.reorder`): no keys or values move
but the pages that two beams are about to write, which copy-on-write takes care of.

The search is the one of Hugging Face transformers (`GenerationMixin._beam_search`), prompt by
prompt: of the ``(1 + stop tokens) * num_beams`` best continuations, those among the first
`num_beams` that end become hypotheses, scored by ``sum of log-probabilities / tokens **
length_penalty``, of which the best `num_beams` are kept; the best `num_beams` that do not end go
on. When a prompt's search ends is a matter of `EarlyStopping`.

Shapes: B prompts, K beams, R = B * K rows (beam k of prompt b in row ``b * K + k``), C room for
generated tokens, S stop tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from paxattn import page_table
from paxattn.decode_step import Status
from paxattn.pool import Pool, make_room, release_rows, with_table
from paxattn.sampling import LogitsProcessor, apply_processor
from paxattn.step import (
    LanguageModel,
    PoolUse,
    first_only,
    left_alone,
    logits_of,
    run_tokens,
    shed,
    window_of,
)

# Below any sum of log-probabilities; finite, so that differences are.
NEVER = -1e9


class EarlyStopping(enum.IntEnum):
    """When a prompt's search ends, once it has `num_beams` hypotheses (transformers' names).

    `FALSE`: when the best running beam, scored at its present length, is no better than the worst
    hypothesis. `TRUE`: at once. `NEVER`: as FALSE, but scored at the length most favourable to it
    (``max_new_tokens`` if the length penalty is positive).
    """

    FALSE = 0
    TRUE = 1
    NEVER = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Beams:
    """K token sequences per prompt, best first.

    Attributes:
        scores: f32[B, K]: of running beams the sum of log-probabilities, of hypotheses that over
            ``length ** length_penalty``; -1e9 where there is none.
        tokens: i32[B, K, C].
        logprobs: f32[B, K, C].
        lens: i32[B, K], tokens; 0 where there is none.
    """

    scores: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    lens: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BeamState:
    """A search in progress.

    Attributes:
        pool: rows ``b * K .. b * K + K - 1`` of its table belong to prompt b.
        status: i32[B], `Status` of each prompt's search. LENGTH: it ran into ``max_new_tokens``.
        last_token: i32[B, K], newest token of each running beam, whose KV is not in the cache.
        running: the beams.
        hypotheses: the best that ended.
        max_new_tokens: i32[B], at most C.
        stop_ids: i32[B, S], padded with -1.
        length_penalty: f32[B]; above 0 favours long sequences (scores are negative).
        early_stopping: i32[B], `EarlyStopping` values.
        use: how the pool was used.
    """

    pool: Pool
    status: jax.Array
    last_token: jax.Array
    running: Beams
    hypotheses: Beams
    max_new_tokens: jax.Array
    stop_ids: jax.Array
    length_penalty: jax.Array
    early_stopping: jax.Array
    use: PoolUse


def no_beams(num_prompts: int, num_beams: int, capacity: int) -> Beams:
    """No beams at all."""
    shape = (num_prompts, num_beams)
    return Beams(
        scores=jnp.full(shape, NEVER, jnp.float32),
        tokens=jnp.zeros((*shape, capacity), jnp.int32),
        logprobs=jnp.zeros((*shape, capacity), jnp.float32),
        lens=jnp.zeros(shape, jnp.int32),
    )


def _pick(beams: Beams, which: jax.Array, **changes: jax.Array) -> Beams:
    """Beams ``which[B, K']`` of each prompt."""

    def take(x: jax.Array) -> jax.Array:
        index = which.reshape(*which.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    return dataclasses.replace(jax.tree.map(take, beams), **changes)


def _grown(beams: Beams, parent: jax.Array, token: jax.Array, scores: jax.Array) -> Beams:
    """Each beam ``parent[B, K']`` with one more token; ``scores`` are the new sums."""
    old = _pick(beams, parent)
    here = jnp.arange(old.tokens.shape[2]) == old.lens[..., None]
    gain = scores - old.scores
    return Beams(
        scores=scores,
        tokens=jnp.where(here, token[..., None], old.tokens),
        logprobs=jnp.where(here, gain[..., None], old.logprobs),
        lens=old.lens + 1,
    )


def _where(mask: jax.Array, yes: Beams, no: Beams) -> Beams:
    """By prompt: ``mask[B]``."""
    return jax.tree.map(
        lambda a, b: jnp.where(mask.reshape(-1, *(1,) * (a.ndim - 1)), a, b), yes, no
    )


def select(state: BeamState, logits: jax.Array, stepped: jax.Array) -> tuple[BeamState, jax.Array]:
    """Choose the next beams and hypotheses of the prompts in ``stepped``.

    Args:
        state: before the step; the pool is left to the caller.
        logits: f32[R, V], of every beam's newest token.
        stepped: bool[B].

    Returns:
        The state, and ``parents`` i32[R]: the row each row's new beam grew from (itself in prompts
        not stepped).
    """
    num_prompts, num_beams = state.last_token.shape
    vocab = logits.shape[-1]
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(num_prompts, num_beams, -1)
    sums = state.running.scores[..., None] + logprobs
    sums = jnp.where(state.running.scores[..., None] > NEVER, sums, NEVER)
    keep = min((1 + state.stop_ids.shape[1]) * num_beams, num_beams * vocab)
    best, flat = lax.top_k(sums.reshape(num_prompts, -1), keep)
    parent, token = flat // vocab, flat % vocab

    length = state.running.lens[:, 0] + 1  # of the first beam: it always exists
    is_last = length >= state.max_new_tokens
    ends = jnp.any(token[..., None] == state.stop_ids[:, None], axis=-1) | is_last[:, None]

    scores, chosen = lax.top_k(jnp.where(ends, NEVER, best), num_beams)
    goes_on = jnp.take_along_axis(parent, chosen, axis=1)
    next_token = jnp.take_along_axis(token, chosen, axis=1)
    running = _grown(state.running, goes_on, next_token, scores)

    first = slice(None), slice(0, num_beams)
    ended = _grown(state.running, parent[first], token[first], best[first])
    penalty = length.astype(jnp.float32) ** state.length_penalty
    valid = ends[first] & (best[first] > NEVER)
    ended = dataclasses.replace(
        ended,
        scores=jnp.where(valid, ended.scores / penalty[:, None], NEVER),
        lens=jnp.where(valid, ended.lens, 0),
    )
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.hypotheses, ended)
    hypotheses = _pick(both, lax.top_k(both.scores, num_beams)[1])

    full = jnp.all(hypotheses.lens > 0, axis=1)
    never = (state.early_stopping == EarlyStopping.NEVER) & (state.length_penalty > 0)
    reach = jnp.where(never, state.max_new_tokens, length).astype(jnp.float32)
    hope = scores[:, 0] / reach**state.length_penalty
    beaten = (state.early_stopping == EarlyStopping.TRUE) | (hope <= hypotheses.scores[:, -1])
    status = jnp.where(full & beaten, jnp.int32(Status.STOP), state.status)
    status = jnp.where(is_last, jnp.int32(Status.LENGTH), status)

    rows = jnp.arange(num_prompts * num_beams, dtype=jnp.int32)
    parents = (jnp.arange(num_prompts)[:, None] * num_beams + goes_on).reshape(-1)
    state = dataclasses.replace(
        state,
        status=jnp.where(stepped, status, state.status),
        last_token=jnp.where(stepped[:, None], next_token, state.last_token),
        running=_where(stepped, running, state.running),
        hypotheses=_where(stepped, hypotheses, state.hypotheses),
    )
    return state, jnp.where(jnp.repeat(stepped, num_beams), parents.astype(jnp.int32), rows)


def beam_step(
    model: LanguageModel,
    state: BeamState,
    *,
    logits_processor: LogitsProcessor | None = None,
    scrub: bool = False,
) -> BeamState:
    """Advance every running prompt's search by one token.

    A prompt's beams advance together or not at all. Of the prompts that find too few pages only
    the first ends, with what hypotheses it has: its pages may let the others go on.

    Args:
        model: see `step.LanguageModel`.
        state: donate it to the enclosing jit.
        logits_processor: see `sampling.sample`.
        scrub: static; zero pages that nobody holds any more before anyone can take them.
    """
    num_prompts, num_beams = state.last_token.shape
    going = state.status == Status.RUNNING
    live = (going[:, None] & (state.running.scores > NEVER)).reshape(-1)
    ones = live.astype(jnp.int32)
    pool, ok = make_room(state.pool, ones, max_new_tokens=1, scrub=scrub)
    fits = jnp.all(ok.reshape(num_prompts, num_beams), axis=1)
    stepped = going & fits
    live &= jnp.repeat(stepped, num_beams)

    pool, hidden = run_tokens(
        model,
        pool,
        state.last_token.reshape(-1),
        jnp.ones_like(ones),
        live=live,
        max_q_len=1,
    )
    logits = apply_processor(
        logits_processor, logits_of(model, hidden), state.running.lens.reshape(-1)
    )
    use = state.use.after(pool.table, window_of(model))
    state, parents = select(state, logits, stepped)

    could = (ok | left_alone(pool.table)).reshape(num_prompts, num_beams)
    failed = first_only(going & ~jnp.all(could, axis=1))
    status = jnp.where(failed, jnp.int32(Status.OUT_OF_PAGES), state.status)
    done = jnp.repeat(going & (status != Status.RUNNING), num_beams)
    pool = release_rows(pool, done, scrub=scrub)
    moved = jnp.repeat(stepped & (status == Status.RUNNING), num_beams)
    pool = with_table(pool, page_table.reorder(pool.table, parents, moved), scrub=scrub)
    pool = shed(model, pool, scrub=scrub)
    return dataclasses.replace(state, pool=pool, status=status, use=use)


def beam_search(
    model: LanguageModel,
    state: BeamState,
    *,
    logits_processor: LogitsProcessor | None = None,
    scrub: bool = False,
) -> BeamState:
    """Run `beam_step` until every prompt's search has ended, in one ``lax.while_loop``.

    Args:
        model: see `step.LanguageModel`.
        state: after `step.prefill` of the first beams; donate it to the enclosing jit.
        logits_processor: see `sampling.sample`.
        scrub: see `beam_step`.
    """
    return lax.while_loop(
        lambda state: jnp.any(state.status == Status.RUNNING),
        lambda state: beam_step(model, state, logits_processor=logits_processor, scrub=scrub),
        state,
    )
