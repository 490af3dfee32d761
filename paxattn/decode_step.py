"""One ragged step: reserve, copy, write, attend; and the loops of prefill and plain decoding.

Every loop of the library calls `ragged_step`, so they cannot drift: `prefill` stores all but the
last token of the prompts, `decode_step` runs every row's newest token and samples the next.
(Prefill computes no logits: the last token of a prompt is a row's first decode step, so that
several samples or beams can start from one stored prompt.)

The whole state of a generation is one pytree, `DecodeState`; a step is a pure function of it. What
cannot be done is data: a row for which no page is left ends with `Status.OUT_OF_PAGES`, and the
other rows go on.
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
class PoolUse:
    """How a pool was used, step by step.

    Attributes:
        num_steps: i32[], steps run.
        peak_pages: i32[], most pages held at once.
        page_steps: f32[], pages held, summed over steps.
        token_steps: f32[], tokens of all rows, summed over steps (shared ones once per row).
        row_steps: f32[], rows served, summed over steps.
    """

    num_steps: jax.Array
    peak_pages: jax.Array
    page_steps: jax.Array
    token_steps: jax.Array
    row_steps: jax.Array

    def after(self, table: PageTable) -> PoolUse:
        """One more step, which left this table."""
        held = table.num_pages - table.num_free
        return PoolUse(
            num_steps=self.num_steps + 1,
            peak_pages=jnp.maximum(self.peak_pages, held),
            page_steps=self.page_steps + held.astype(jnp.float32),
            token_steps=self.token_steps + jnp.sum(table.kv_lens).astype(jnp.float32),
            row_steps=self.row_steps + jnp.sum(table.kv_lens > 0).astype(jnp.float32),
        )


def no_use() -> PoolUse:
    """Before the first step."""
    zero, nothing = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    return PoolUse(
        num_steps=zero,
        peak_pages=zero,
        page_steps=nothing,
        token_steps=nothing,
        row_steps=nothing,
    )


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
        seen: bool[R, V], tokens that are in the row's sequence (for the repetition penalty); the
            newest one may be missing.
        tokens: i32[R, C], the generated tokens; the first ``num_generated`` are valid.
        logprobs: f32[R, C], their log-probabilities under the model.
        use: how the pool was used.
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
    use: PoolUse


def make_room(
    table: PageTable,
    cache: KVCache,
    new_tokens: jax.Array,
    *,
    max_new_tokens: int,
    scrub: bool = False,
) -> tuple[PageTable, KVCache, jax.Array]:
    """Reserve pages for new tokens, and run the copies that copy-on-write asks for.

    Args:
        table: the page table.
        cache: the pages.
        new_tokens: i32[R].
        max_new_tokens: static bound of ``new_tokens``.
        scrub: static; zero shared pages that every holder has left for a copy of its own.

    Returns:
        ``(table, cache, ok bool[R])``, see `page_table.reserve`.
    """
    table, ok, copies = page_table.reserve(
        table, new_tokens, max_new_pages=-(-max_new_tokens // table.page_size)
    )
    cache = kv_cache.copy_pages(cache, copies)
    if scrub:
        holders = table.ref_counts.at[copies.src].get(mode="fill", fill_value=1)
        left = jnp.where(holders > 0, table.num_pages, copies.src)
        cache = kv_cache.scrub(cache, left, 0, copies.count)
    return table, cache, ok


def ragged_step(
    model: LanguageModel,
    table: PageTable,
    cache: KVCache,
    tokens: jax.Array,
    q_lens: jax.Array,
    *,
    live: jax.Array | None = None,
    max_q_len: int | None = None,
    scrub: bool = False,
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
        scrub: see `make_room`.

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
    table, cache, ok = make_room(table, cache, new_tokens, max_new_tokens=max_q_len, scrub=scrub)
    live = ok if live is None else live & ok
    batch = ragged_batch(table, q_lens, num_tokens=num_tokens, max_q_len=max_q_len, live=live)
    hidden, cache = model(tokens, batch, cache)
    table, _ = page_table.append(table, jnp.where(live, q_lens, 0))
    return table, cache, hidden, ok


def scrub_freed(cache: KVCache, before: PageTable, after: PageTable) -> KVCache:
    """Zero the pages that a table step gave back: the top of the free stack after it."""
    return kv_cache.scrub(cache, after.free_pages, before.num_free, after.num_free)


def release_rows(
    table: PageTable, cache: KVCache, mask: jax.Array, *, scrub: bool
) -> tuple[PageTable, KVCache]:
    """Release rows; with ``scrub`` zero the pages that nobody holds any more."""
    freed = page_table.release(table, mask)
    return freed, scrub_freed(cache, table, freed) if scrub else cache


def prefill(
    model: LanguageModel,
    table: PageTable,
    cache: KVCache,
    use: PoolUse,
    prompts: jax.Array,
    starts: jax.Array,
    lens: jax.Array,
    *,
    chunk: int,
    scrub: bool = False,
) -> tuple[PageTable, KVCache, PoolUse, jax.Array]:
    """Store the rows' tokens, in chunks of packed tokens of as many rows as fit.

    What a row holds already (its ``kv_lens`` first tokens) is not computed again. Of the rows that
    find no page in a step only the first ends and gives its pages back: they may let the others go
    on. So every step either stores tokens or ends a row.

    Args:
        model: see `LanguageModel`.
        table: donate it to the enclosing jit.
        cache: donate it too.
        use: how the pool was used before.
        prompts: i32[N], tokens.
        starts: i32[R], where each row's tokens begin in ``prompts``; rows may share them.
        lens: i32[R], tokens to store; 0 leaves a row as it is.
        chunk: static tokens per step.
        scrub: static; zero the pages of rows that end.

    Returns:
        ``(table, cache, use, ok bool[R])``; rows that are not ok are empty.
    """

    def left(table: PageTable, failed: jax.Array) -> jax.Array:
        return jnp.where(failed, 0, jnp.maximum(lens - table.kv_lens, 0))

    def body(carry: tuple) -> tuple:
        table, cache, use, failed = carry
        todo = left(table, failed)
        q_lens = jnp.clip(chunk - (jnp.cumsum(todo) - todo), 0, todo)
        rows, offsets, _ = page_table.token_rows(q_lens, chunk)
        tokens = prompts.at[starts[rows] + table.kv_lens[rows] + offsets].get(mode="clip")
        table, cache, _, ok = ragged_step(model, table, cache, tokens, q_lens)
        use = use.after(table)
        ends = _first(~ok)
        table, cache = release_rows(table, cache, ends, scrub=scrub)
        return table, cache, use, failed | ends

    carry = lax.while_loop(
        lambda carry: jnp.any(left(carry[0], carry[3]) > 0),
        body,
        (table, cache, use, jnp.zeros(lens.shape, bool)),
    )
    return *carry[:3], ~carry[3]


def _first(mask: jax.Array) -> jax.Array:
    """The mask without all but its first True."""
    return mask & (jnp.cumsum(mask) == 1)


def record(
    state: DecodeState,
    tokens: jax.Array,
    logprobs: jax.Array,
    count: jax.Array,
    *,
    failed: jax.Array,
    scrub: bool,
) -> DecodeState:
    """Take down new tokens, end the rows that are through, and release these.

    Args:
        state: its table and cache are those after the step.
        tokens: i32[R, m], new tokens of each row.
        logprobs: f32[R, m].
        count: i32[R], how many of them are new. What comes after a stop token or beyond
            ``max_new_tokens`` is left out.
        failed: bool[R], rows that found no page; only the first of them ends.
        scrub: static; zero the pages that ended rows give back before anyone can take them.
    """
    capacity = state.tokens.shape[1]
    rows = jnp.arange(state.status.size)[:, None]
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    count = jnp.minimum(count, state.max_new_tokens - state.num_generated)
    is_stop = jnp.any(tokens[..., None] == state.stop_ids[:, None], axis=-1)
    is_stop &= place < count[:, None]
    stopped = jnp.any(is_stop, axis=1)
    count = jnp.where(stopped, jnp.argmax(is_stop, axis=1).astype(jnp.int32) + 1, count)
    index = jnp.where(place < count[:, None], state.num_generated[:, None] + place, capacity)
    newest = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    num_generated = state.num_generated + count

    full = (count > 0) & (num_generated >= state.max_new_tokens)
    status = jnp.where(full, jnp.int32(Status.LENGTH), state.status)
    status = jnp.where(stopped, jnp.int32(Status.STOP), status)
    status = jnp.where(_first(failed), jnp.int32(Status.OUT_OF_PAGES), status)
    ended = (state.status == Status.RUNNING) & (status != Status.RUNNING)
    table, cache = release_rows(state.table, state.cache, ended, scrub=scrub)
    return dataclasses.replace(
        state,
        table=table,
        cache=cache,
        status=status,
        last_token=jnp.where(count > 0, newest, state.last_token),
        num_generated=num_generated,
        tokens=state.tokens.at[rows, index].set(tokens, mode="drop"),
        logprobs=state.logprobs.at[rows, index].set(logprobs, mode="drop"),
        use=state.use.after(state.table),
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
    table, cache, hidden, ok = ragged_step(
        model,
        state.table,
        state.cache,
        state.last_token,
        jnp.ones_like(state.status),
        live=live,
        max_q_len=1,
        scrub=scrub,
    )
    stepped = live & ok
    rows = jnp.arange(live.size)
    seen = state.seen.at[jnp.where(stepped, rows, live.size), state.last_token].set(
        True, mode="drop"
    )
    token, logprob = sample(
        model.logits(hidden), state.sampling, state.num_generated, seen, logits_processor
    )
    return record(
        dataclasses.replace(state, table=table, cache=cache, seen=seen),
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
