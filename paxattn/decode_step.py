"""One ragged step: reserve, copy, write, attend, sample, record, release.

Every loop of the library (prefill, decode, streaming) calls `decode_step`, so they cannot drift.
The whole state of a generation is one pytree, `DecodeState`; the step is a pure function of it.
What cannot be done is data: a row for which no page is left ends with `Status.OUT_OF_PAGES`, and
the other rows go on.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from paxattn import kv_cache, page_table
from paxattn.kv_cache import KVCache
from paxattn.page_table import PageTable
from paxattn.ragged import RaggedBatch, check_same_pool, ragged_batch
from paxattn.sampling import LogitsProcessor, RowSampling, sample


class LanguageModel(Protocol):
    """What a step needs of a model; `paxattn.models.Decoder` is one, yours may be another."""

    def init_cache(
        self, *, num_pages: int, page_size: int, dtype: DTypeLike | None = None
    ) -> KVCache:
        """Allocate pages for this model's layers; None: in the model's own dtype."""

    def __call__(
        self, tokens: jax.Array, batch: RaggedBatch, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Run i32[T] packed tokens; return hidden states ``[T, hidden]`` and the cache."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Turn hidden states ``[K, hidden]`` into f32[K, vocab_size]."""


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
        table: who owns which page.
        cache: the pages.
        status: i32[R], `Status` values.
        last_token: i32[R], the newest token of each row, whose KV is not yet in the cache.
        num_generated: i32[R], tokens generated so far.
        max_new_tokens: i32[R], at most C.
        stop_ids: i32[R, S], tokens that end a row, padded with -1.
        sampling: parameters per row.
        seen: bool[R, V], tokens that are in the row's sequence (for the repetition penalty).
        tokens: i32[R, C], the generated tokens; the first ``num_generated`` are valid.
        logprobs: f32[R, C], their log-probabilities under the model.
        num_steps: i32[], steps run.
        peak_pages: i32[], most pages held at once.
        page_steps: f32[], pages held, summed over steps.
        token_steps: f32[], tokens stored, summed over steps.
        row_steps: f32[], rows served, summed over steps.
    """

    table: PageTable
    cache: KVCache
    status: jax.Array
    last_token: jax.Array
    num_generated: jax.Array
    max_new_tokens: jax.Array
    stop_ids: jax.Array
    sampling: RowSampling
    seen: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    num_steps: jax.Array
    peak_pages: jax.Array
    page_steps: jax.Array
    token_steps: jax.Array
    row_steps: jax.Array


def ragged_step(
    model: LanguageModel,
    table: PageTable,
    cache: KVCache,
    tokens: jax.Array,
    q_lens: jax.Array,
    *,
    live: jax.Array | None = None,
    max_q_len: int | None = None,
) -> tuple[PageTable, KVCache, jax.Array, jax.Array]:
    """Run new tokens of several rows through the model: reserve, copy, write, attend, append.

    Args:
        model: see `LanguageModel`.
        table: the page table; donate it to the enclosing jit.
        cache: the pages; donate them too.
        tokens: i32[T], row after row without gaps, padding at the end.
        q_lens: i32[R], how many of them belong to each row.
        live: bool[R]; the tokens of other rows are computed but neither stored nor counted.
        max_q_len: static upper bound of ``q_lens``; T by default, 1 for a decode step.

    Returns:
        ``(table, cache, hidden [T, hidden_size], ok bool[R])``. A live row for which no room could
        be had is not ok: it is left as it was, and its hidden states mean nothing.

    Raises:
        ValueError: the cache and the table differ in pages or page size.
    """
    check_same_pool(cache, table)
    num_tokens = tokens.shape[0]
    max_q_len = num_tokens if max_q_len is None else max_q_len
    new_tokens = q_lens if live is None else jnp.where(live, q_lens, 0)
    table, ok, copies = page_table.reserve(
        table, new_tokens, max_new_pages=-(-max_q_len // table.page_size)
    )
    cache = kv_cache.copy_pages(cache, copies)
    live = ok if live is None else live & ok
    batch = ragged_batch(table, q_lens, num_tokens=num_tokens, max_q_len=max_q_len, live=live)
    hidden, cache = model(tokens, batch, cache)
    table, _ = page_table.append(table, jnp.where(live, q_lens, 0))
    return table, cache, hidden, ok


def release_rows(
    table: PageTable, cache: KVCache, mask: jax.Array, *, scrub: bool
) -> tuple[PageTable, KVCache]:
    """Release rows; with ``scrub`` zero the pages that nobody holds any more."""
    freed = page_table.release(table, mask)
    if scrub:
        cache = kv_cache.scrub(cache, freed.free_pages, table.num_free, freed.num_free)
    return freed, cache


def decode_step(
    model: LanguageModel,
    state: DecodeState,
    tokens: jax.Array,
    q_lens: jax.Array,
    *,
    live: jax.Array,
    emit: jax.Array,
    max_q_len: int | None = None,
    logits_processor: LogitsProcessor | None = None,
    scrub: bool = False,
) -> DecodeState:
    """Advance a batch by one step.

    Of the rows that find no page only the first ends: the pages that it gives back may let the
    others go on. Those are left as they were, for another step with the same tokens.

    Args:
        model: see `LanguageModel`.
        state: donate it to the enclosing jit.
        tokens: i32[T], packed as for `ragged_step`.
        q_lens: i32[R].
        live: bool[R], rows whose tokens count.
        emit: bool[R], live rows that get a new token from this step: those whose last known token
            is in it.
        max_q_len: static upper bound of ``q_lens``.
        logits_processor: see `sampling.sample`.
        scrub: static; zero the pages that ended rows give back before anyone can take them.

    Returns:
        The state: new tokens recorded, rows that ended released, their pages free again.
    """
    table, cache, hidden, ok = ragged_step(
        model, state.table, state.cache, tokens, q_lens, live=live, max_q_len=max_q_len
    )
    rows, _, active = page_table.token_rows(q_lens, tokens.shape[0])
    num_rows, capacity = state.tokens.shape
    counted = active & (live & ok)[rows]
    seen = state.seen.at[jnp.where(counted, rows, num_rows), tokens].set(True, mode="drop")

    last = jnp.maximum(jnp.cumsum(q_lens) - 1, 0)
    new_token, logprob = sample(
        model.logits(hidden[last]), state.sampling, state.num_generated, seen, logits_processor
    )
    emit = emit & live & ok
    index = (jnp.arange(num_rows), jnp.where(emit, state.num_generated, capacity))
    num_generated = state.num_generated + emit.astype(jnp.int32)
    stopped = emit & jnp.any(new_token[:, None] == state.stop_ids, axis=1)
    full = emit & (num_generated >= state.max_new_tokens)
    status = jnp.where(full, jnp.int32(Status.LENGTH), state.status)
    status = jnp.where(stopped, jnp.int32(Status.STOP), status)
    failed = live & ~ok
    failed &= jnp.cumsum(failed) == 1
    status = jnp.where(failed, jnp.int32(Status.OUT_OF_PAGES), status)

    held = table.num_pages - table.num_free
    kv_lens = table.kv_lens
    table, cache = release_rows(table, cache, live & (status != Status.RUNNING), scrub=scrub)
    return dataclasses.replace(
        state,
        table=table,
        cache=cache,
        status=status,
        last_token=jnp.where(emit, new_token, state.last_token),
        num_generated=num_generated,
        seen=seen,
        tokens=state.tokens.at[index].set(new_token, mode="drop"),
        logprobs=state.logprobs.at[index].set(logprob, mode="drop"),
        num_steps=state.num_steps + 1,
        peak_pages=jnp.maximum(state.peak_pages, held),
        page_steps=state.page_steps + held.astype(jnp.float32),
        token_steps=state.token_steps + jnp.sum(kv_lens).astype(jnp.float32),
        row_steps=state.row_steps + jnp.sum(kv_lens > 0).astype(jnp.float32),
    )


def prefill(
    model: LanguageModel,
    state: DecodeState,
    prompts: jax.Array,
    prompt_lens: jax.Array,
    *,
    chunk: int,
    logits_processor: LogitsProcessor | None = None,
    scrub: bool = False,
) -> DecodeState:
    """Run all prompts in chunks of packed tokens; every row that fits gets its first new token.

    A chunk is run again for the rows that found no page, until none of them waits: each time the
    first of them ends, so this comes to an end.

    Args:
        model: see `LanguageModel`.
        state: rows that take part have ``Status.RUNNING`` and are empty.
        prompts: i32[>= sum(prompt_lens)], row after row without gaps.
        prompt_lens: i32[R].
        chunk: static tokens per step; a chunk may end one prompt and begin the next.
        logits_processor: see `sampling.sample`.
        scrub: see `decode_step`.
    """
    ends = jnp.cumsum(prompt_lens)
    starts = ends - prompt_lens
    prompts = jnp.pad(prompts, (0, chunk))  # so that the last chunk's slice is never shifted back

    def waiting(done: jax.Array, state: DecodeState) -> jax.Array:
        """Rows that have not stored what they have in the chunk that begins at ``done``."""
        stored = state.table.kv_lens >= jnp.minimum(ends, done + chunk) - starts
        return (state.status == Status.RUNNING) & ~stored

    def body(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        done, state = carry
        q_lens = jnp.clip(ends, done, done + chunk) - jnp.clip(starts, done, done + chunk)
        state = decode_step(
            model,
            state,
            lax.dynamic_slice_in_dim(prompts, done, chunk),
            q_lens,
            live=waiting(done, state),
            emit=ends <= done + chunk,
            max_q_len=chunk,
            logits_processor=logits_processor,
            scrub=scrub,
        )
        return jnp.where(jnp.any(waiting(done, state)), done, done + chunk), state

    return lax.while_loop(lambda c: c[0] < ends[-1], body, (jnp.zeros_like(ends[-1]), state))[1]


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
    last_step = state.num_steps + max_steps

    def running(state: DecodeState) -> jax.Array:
        return state.status == Status.RUNNING

    def body(state: DecodeState) -> DecodeState:
        return decode_step(
            model,
            state,
            state.last_token,
            jnp.ones_like(state.status),
            live=running(state),
            emit=running(state),
            max_q_len=1,
            logits_processor=logits_processor,
            scrub=scrub,
        )

    return lax.while_loop(
        lambda state: jnp.any(running(state)) & (state.num_steps < last_step), body, state
    )
