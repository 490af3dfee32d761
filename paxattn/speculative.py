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

Guesses may branch: a *tree* of several continuations is one ragged step too, in which a token
attends to its ancestors among the guesses (`tree`). Where the target's choice is among a node's
children, the walk goes on from there; the tokens on its path move to the slots that follow the
row's (`kv_cache.move_slots`), and the rest is given back.

A matrix product of k + 1 tokens may round otherwise than one of a single token: where the two best
candidates differ by less than about 1e-4, speculation may choose the other one.

Shapes: R rows, k guesses one after the other, b in the place of each, n = 1 + k * b nodes of the
tree, H tokens that a row can hold, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from paxattn import kv_cache, page_table
from paxattn.decode_step import DecodeState, Status, record
from paxattn.kv_cache import KVCache
from paxattn.ngram import NGram, propose_ngram
from paxattn.page_table.pages import read_entries, when
from paxattn.penalties import count_generated
from paxattn.pool import Pool, make_room, note_tokens, with_table
from paxattn.sampling import LogitsProcessor, RowSampling, runners_up, sample
from paxattn.step import LanguageModel, logits_of, ragged_step, run_tokens, shed
from paxattn.tree import Tree, spine, walk


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DraftModel:
    """Guesses with a smaller model of the same vocabulary, which has its own pages.

    Attributes:
        model: see `step.LanguageModel`.
        num_tokens: k, guesses per step, one after the other.
        branches: guesses in the place of each: the model goes on from its first choice, and those
            that it would choose next are checked beside it, in the same step.
    """

    model: Any
    num_tokens: int = field(default=4, metadata={"static": True})
    branches: int = field(default=1, metadata={"static": True})

    @property
    def tree(self) -> Tree:
        """How the guesses hang together."""
        return spine(self.num_tokens, self.branches)


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
        accepted: i32[], guesses kept; ``accepted / drafted`` is the acceptance rate (of b guesses
            in one place at most one can be kept).
    """

    decode: DecodeState
    history: jax.Array
    pool: Pool | None
    drafted: jax.Array
    accepted: jax.Array


def _propose_model(
    drafter: DraftModel,
    state: SpeculativeState,
    live: jax.Array,
    limit: jax.Array,
    logits_processor: LogitsProcessor | None,
    scrub: bool,
) -> tuple[SpeculativeState, jax.Array, jax.Array]:
    """Run the draft model for up to ``limit[R]`` guesses, and once more to store the last one.

    Its cache lacks a token after a leaf was kept: such a row stores it first, and its last guess
    not. A row that has fallen behind further (no page was free) gets no guesses any more.

    Returns:
        The state, guesses i32[R, k, b], and how many of the k there are, i32[R].
    """
    k, branches = drafter.num_tokens, drafter.branches
    decode = state.decode
    if state.pool is None:
        raise ValueError("a DraftModel needs a pool of its own in the state")
    held = state.pool.table.kv_lens
    behind = decode.pool.table.kv_lens - held
    live &= (behind >= 0) & (behind <= 1)
    behind, limit = jnp.where(live, behind, 0), jnp.where(live, limit, -1)
    missing = jnp.take_along_axis(state.history, held[:, None], axis=1)[:, 0]

    def step(carry: tuple, i: jax.Array) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        pool, token, counts, fine = carry
        pool, hidden, ok = ragged_step(
            drafter.model, pool, token, jnp.ones_like(token),
            live=fine & (i <= limit + behind), max_q_len=1, scrub=scrub,
        )  # fmt: skip
        asked = (
            logits_of(drafter.model, hidden), decode.sampling,
            decode.num_generated + jnp.maximum(i - behind, 0), lambda: counts, logits_processor,
        )  # fmt: skip
        tokens = runners_up(*asked, count=branches) if branches > 1 else sample(*asked)[0][:, None]
        is_guess = i >= behind
        token = jnp.where(is_guess, tokens[:, 0], decode.last_token)
        counts = count_generated(counts, tokens[:, :1], is_guess[:, None])
        return (pool, token, counts, fine & ok), (tokens, fine & ok)

    first = jnp.where(behind > 0, missing, decode.last_token)
    carry = (state.pool, first, decode.counts, live)
    carry, (tokens, fine) = lax.scan(step, carry, jnp.arange(k + 1))
    state = dataclasses.replace(state, pool=carry[0])
    guesses = tokens[behind[:, None] + jnp.arange(k), jnp.arange(live.size)[:, None]]
    count = jnp.sum(fine, axis=0, dtype=jnp.int32) - behind
    return state, guesses, jnp.maximum(jnp.minimum(count, limit), 0)


def _choose(
    model: LanguageModel,
    decode: DecodeState,
    hidden: jax.Array,
    tree: Tree,
    candidates: jax.Array,
    rows: jax.Array,
    offsets: jax.Array,
    logits_processor: LogitsProcessor | None,
) -> tuple[jax.Array, jax.Array]:
    """What plain decoding would choose after each packed token: tokens i32[T], logprobs f32[T]."""

    def counts() -> jax.Array:
        """After a guess, it and its ancestors count too; the first node is counted already."""
        upto = jnp.asarray(tree.is_ancestor())[offsets] & (candidates[rows] >= 0)
        return count_generated(decode.counts[rows], candidates[rows, 1:], upto[:, 1:])

    index = decode.num_generated[rows] + jnp.asarray(tree.depths())[offsets]
    sampling: RowSampling = jax.tree.map(lambda x: x[rows], decode.sampling)
    return sample(logits_of(model, hidden), sampling, index, counts, logits_processor)


def _compact(
    pool: Pool, lens: jax.Array, path: jax.Array, gained: jax.Array, tokens: jax.Array
) -> Pool:
    """Move the nodes passed to the slots after the rows' first ``lens`` tokens.

    Args:
        pool: holds the whole trees, in pages of the rows' own.
        lens: i32[R].
        path: i32[R, k + 1], nodes; none is before its place in the path.
        gained: i32[R], how many of them to keep.
        tokens: i32[R, k + 1], theirs.
    """
    table = pool.table
    size = table.page_size
    place = jnp.arange(path.shape[1], dtype=jnp.int32)

    def slots(positions: jax.Array) -> jax.Array:
        pages = read_entries(table, jnp.arange(lens.size)[:, None], positions // size)
        return pages * size + positions % size

    moves = (place < gained[:, None]) & (path != place)
    src, dst = slots(lens[:, None] + path), slots(lens[:, None] + place)
    dst = jnp.where(moves, dst, table.num_pages * size).ravel()

    def move(cache: KVCache) -> tuple[KVCache]:
        return (kv_cache.move_slots(cache, src.ravel(), dst),)

    (cache,) = when(jnp.any(moves), move, pool.cache)
    return note_tokens(dataclasses.replace(pool, cache=cache), dst, tokens.ravel())


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
    k, branches, tree = drafter.num_tokens, drafter.branches, drafter.tree
    num_nodes = 1 + k * branches
    decode = state.decode
    live = decode.status == Status.RUNNING
    lens = decode.pool.table.kv_lens
    limit = jnp.minimum(k, decode.max_new_tokens - decode.num_generated - 1)
    if isinstance(drafter, NGram):
        guesses, count = propose_ngram(
            state.history, lens + 1, num_tokens=k, longest=drafter.longest, branches=branches
        )
        count = jnp.minimum(count, limit)
    else:
        state, guesses, count = _propose_model(drafter, state, live, limit, logits_processor, scrub)

    # Every row's next token comes before anybody's guesses.
    pool, ok = make_room(decode.pool, live.astype(jnp.int32), max_new_tokens=1, scrub=scrub)
    runs = live & ok
    wanted = jnp.where(runs, count * branches + 1, 0)
    pool, ok = make_room(pool, wanted, max_new_tokens=num_nodes, scrub=scrub)
    count = jnp.where(runs & ok, count, 0)
    q_lens = jnp.where(runs, count * branches + 1, 0)
    num_tokens = lens.size * num_nodes
    rows, offsets, active = page_table.token_rows(q_lens, num_tokens)
    guesses = guesses.reshape(lens.size, -1)
    candidates = jnp.concatenate([decode.last_token[:, None], guesses], axis=1)
    tokens = jnp.where(active, jnp.maximum(candidates[rows, offsets], 0), 0)
    pool, hidden = run_tokens(
        model, pool, tokens, q_lens, live=runs, max_q_len=num_nodes,
        tree=tree if branches > 1 else None,
    )  # fmt: skip
    use = decode.use.at_peak(pool.table)  # before guesses are given back
    token, logprob = _choose(
        model, decode, hidden, tree, candidates, rows, offsets, logits_processor
    )
    place = (jnp.where(active, rows, lens.size), offsets)
    chosen = jnp.zeros_like(candidates).at[place].set(token, mode="drop")
    logprobs = jnp.zeros(candidates.shape, jnp.float32).at[place].set(logprob, mode="drop")

    path, kept = walk(tree, candidates, chosen, count, branches)
    gained = jnp.where(runs, kept + 1, 0)
    tested = (guesses >= 0) & (jnp.arange(k * branches) < (count * branches)[:, None])
    candidates, chosen, logprobs = (
        jnp.take_along_axis(x, path, axis=1) for x in (candidates, chosen, logprobs)
    )
    if branches > 1:
        pool = _compact(pool, lens, path, gained, candidates)
    table, _ = page_table.truncate(pool.table, jnp.where(runs, lens + gained, -1))
    pool = with_table(pool, table, scrub=scrub)
    at = jnp.where(jnp.arange(k + 1) < gained[:, None], lens[:, None] + 1 + jnp.arange(k + 1), -1)
    at = jnp.where(at >= 0, at, state.history.shape[1])
    history = state.history.at[jnp.arange(lens.size)[:, None], at].set(chosen, mode="drop")
    decode = record(
        model,
        dataclasses.replace(decode, pool=pool, use=use),
        chosen,
        logprobs,
        gained,
        failed=live & ~runs,
        scrub=scrub,
    )
    own = state.pool
    if own is not None and isinstance(drafter, DraftModel):
        running = decode.status == Status.RUNNING
        # The draft model has stored its first choices only.
        first = path[:, 1:] == 1 + jnp.arange(k) * branches
        known = jnp.minimum(gained, 1 + jnp.sum(first, axis=1, dtype=jnp.int32))
        lens = jnp.where(running, jnp.minimum(lens + known, own.table.kv_lens), 0)
        own = with_table(own, page_table.truncate(own.table, lens)[0], scrub=scrub)
        own = shed(drafter.model, own, scrub=scrub)
    return dataclasses.replace(
        state,
        decode=decode,
        history=history,
        pool=own,
        drafted=state.drafted + jnp.sum(tested & runs[:, None], dtype=jnp.int32),
        accepted=state.accepted + jnp.sum(jnp.where(runs, kept, 0), dtype=jnp.int32),
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
