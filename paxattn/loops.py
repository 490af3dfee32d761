"""The compiled functions behind `generate` and `stream`: fill the pool, decode, search, stop.

Shapes come from `requests.Sizes`, everything else is data: another call with the same sizes
compiles nothing.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from paxattn import page_table
from paxattn.beam import Beams, BeamState, beam_search, no_beams
from paxattn.decode_step import DecodeState, Status, decode
from paxattn.penalties import count_tokens
from paxattn.pool import Pool, init_pool, release_rows, with_table
from paxattn.requests import Sizes
from paxattn.sampling import LogitsProcessor, RowSampling
from paxattn.speculative import Drafter, DraftModel, SpeculativeState, speculate
from paxattn.step import PackedPrompts, PoolUse, new_cache, no_use, prefill


def _fill(
    model: Any,
    pool: Pool | None,
    packed: PackedPrompts,
    lens: jax.Array,
    *,
    sizes: Sizes,
    fork: bool,
    scrub: bool,
) -> tuple[Pool, PoolUse, jax.Array]:
    """Store all but the last token of the prompts in a pool, or a new one; ``ok`` bool[R].

    Each prompt is stored once, by the first row of its group; with ``fork`` the others share it.
    """
    num_rows = lens.shape[0]
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    leader = rows // sizes.group * sizes.group
    if pool is None:
        cache = new_cache(
            model, num_pages=sizes.num_pages, page_size=sizes.page_size, dtype=sizes.kv_dtype
        )
        pool = init_pool(cache, max_seqs=num_rows, max_pages_per_seq=sizes.max_pages_per_seq)
    lens = jnp.where(rows == leader, jnp.maximum(lens - 1, 0), 0)
    pool, use, ok = prefill(model, pool, no_use(), packed, lens, chunk=sizes.chunk, scrub=scrub)
    if fork and sizes.group > 1:
        table, _ = page_table.fork(pool.table, leader, rows)  # a leader onto itself: left as it is
        pool = with_table(pool, table, scrub=False)
    return pool, use, ok[leader]


def _first_status(
    prompt_lens: jax.Array, max_new_tokens: jax.Array, sizes: Sizes
) -> tuple[jax.Array, jax.Array]:
    """Status i32[R] of rows before prefill, and the tokens that it has to take care of."""
    status = jnp.where(max_new_tokens > 0, jnp.int32(Status.RUNNING), jnp.int32(Status.LENGTH))
    # A prompt larger than the pool takes nothing from the others.
    too_long = -(-prompt_lens // sizes.page_size) > sizes.num_pages
    status = jnp.where(too_long, jnp.int32(Status.OUT_OF_PAGES), status)
    status = jnp.where(prompt_lens > 0, status, jnp.int32(Status.EMPTY))
    return status, jnp.where(status == Status.RUNNING, prompt_lens, 0)


def _last_tokens(packed: PackedPrompts, prompt_lens: jax.Array) -> jax.Array:
    """The last token of each row's prompt, i32[R]."""
    return packed.tokens.at[packed.starts + prompt_lens - 1].get(mode="clip")


@partial(jax.jit, donate_argnames=("pool",), static_argnames=("sizes", "scrub"))
def start(
    model: Any,
    draft: Drafter | None,
    pool: Pool | None,
    packed: PackedPrompts,
    prompt_lens: jax.Array,
    max_new_tokens: jax.Array,
    stop_ids: jax.Array,
    sampling: RowSampling,
    *,
    sizes: Sizes,
    scrub: bool,
) -> DecodeState | SpeculativeState:
    """Store the prompts in a pool without rows; None: allocate one."""
    num_rows = prompt_lens.shape[0]
    status, lens = _first_status(prompt_lens, max_new_tokens, sizes)
    pool, use, ok = _fill(model, pool, packed, lens, sizes=sizes, fork=True, scrub=scrub)
    running = status == Status.RUNNING
    width = sizes.max_pages_per_seq * sizes.page_size
    place = jnp.arange(width, dtype=jnp.int32)
    history = packed.tokens.at[packed.starts[:, None] + place].get(mode="clip")
    state = DecodeState(
        pool=pool,
        status=jnp.where(running & ~ok, jnp.int32(Status.OUT_OF_PAGES), status),
        last_token=_last_tokens(packed, prompt_lens),
        num_generated=jnp.zeros(num_rows, jnp.int32),
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
        counts=count_tokens(history, prompt_lens, prompt_lens, model.config.vocab_size),
        tokens=jnp.zeros((num_rows, sizes.capacity), jnp.int32),
        logprobs=jnp.zeros((num_rows, sizes.capacity), jnp.float32),
        use=use,
    )
    if draft is None:
        return state
    draft_pool = None
    if isinstance(draft, DraftModel):
        draft_pool, _, _ = _fill(
            draft.model, None, packed, lens, sizes=sizes, fork=True, scrub=scrub
        )
    zero = jnp.zeros((), jnp.int32)
    return SpeculativeState(
        decode=state,
        history=history,
        pool=draft_pool,
        drafted=zero,
        accepted=zero,
    )


@partial(jax.jit, donate_argnames=("state",), static_argnames=("logits_processor", "scrub"))
def go_on(
    model: Any,
    draft: Drafter | None,
    state: Any,
    max_steps: jax.Array,
    *,
    logits_processor: LogitsProcessor | None,
    scrub: bool,
) -> DecodeState | SpeculativeState:
    """Decode for up to ``max_steps``; the table and the pages are donated."""
    if draft is None:
        return decode(model, state, max_steps, logits_processor=logits_processor, scrub=scrub)
    return speculate(model, draft, state, max_steps, logits_processor=logits_processor, scrub=scrub)


@partial(jax.jit, donate_argnames=("state",), static_argnames=("scrub",))
def stop_rows(state: Any, mask: jax.Array, *, scrub: bool) -> DecodeState | SpeculativeState:
    """End rows from the host side; a draft model's follow at its next step."""
    decode = state.decode if isinstance(state, SpeculativeState) else state
    decode = dataclasses.replace(
        decode,
        pool=release_rows(decode.pool, mask, scrub=scrub),
        status=jnp.where(mask, jnp.int32(Status.STOP), decode.status),
    )
    if isinstance(state, SpeculativeState):
        return dataclasses.replace(state, decode=decode)
    return decode


@partial(jax.jit, donate_argnames=("pool",), static_argnames=("sizes", "logits_processor", "scrub"))
def search(
    model: Any,
    pool: Pool | None,
    packed: PackedPrompts,
    prompt_lens: jax.Array,
    max_new_tokens: jax.Array,
    stop_ids: jax.Array,
    length_penalty: jax.Array,
    early_stopping: jax.Array,
    *,
    sizes: Sizes,
    logits_processor: LogitsProcessor | None,
    scrub: bool,
) -> tuple[Pool, jax.Array, Beams, Beams, PoolUse]:
    """Beam search with ``sizes.group`` beams, from the prompts to the end.

    Args:
        model: see `step.LanguageModel`.
        pool: see `start`.
        packed: see `requests.Requests`, like what follows.
        prompt_lens: i32[R].
        max_new_tokens: i32[R].
        stop_ids: i32[R, S].
        length_penalty: f32[], see `beam.BeamState`.
        early_stopping: i32[], `beam.EarlyStopping`.
        sizes: what is compiled for.
        logits_processor: see `sampling.sample`.
        scrub: zero pages that nobody holds any more.

    Returns:
        The pool, without rows; status i32[B], hypotheses, the beams that were running last, and
        how the pool was used.
    """
    num_beams = sizes.group
    status, lens = _first_status(prompt_lens, max_new_tokens, sizes)
    pool, use, ok = _fill(model, pool, packed, lens, sizes=sizes, fork=False, scrub=scrub)
    status = jnp.where((status == Status.RUNNING) & ~ok, jnp.int32(Status.OUT_OF_PAGES), status)
    num_prompts = status.size // num_beams
    none = no_beams(num_prompts, num_beams, sizes.capacity)
    state = BeamState(
        pool=pool,
        status=status[::num_beams],
        last_token=_last_tokens(packed, prompt_lens).reshape(num_prompts, num_beams),
        running=dataclasses.replace(none, scores=none.scores.at[:, 0].set(0.0)),
        hypotheses=none,
        max_new_tokens=max_new_tokens[::num_beams],
        stop_ids=stop_ids[::num_beams],
        length_penalty=jnp.broadcast_to(length_penalty, num_prompts),
        early_stopping=jnp.broadcast_to(early_stopping, num_prompts),
        use=use,
    )
    state = beam_search(model, state, logits_processor=logits_processor, scrub=scrub)
    return state.pool, state.status, state.hypotheses, state.running, state.use
