"""One ragged step: reserve, copy, write, attend, append. Every loop of the library calls it.

So they cannot drift: prefill (here), plain decoding, beam search and speculation differ in the
tokens that they run and in what they make of the hidden states. What cannot be done is data: a row
for which no page is left is reported and left as it was, and the others go on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from paxattn import page_table
from paxattn.kv_cache import KVCache
from paxattn.page_table import PageTable
from paxattn.page_table.inputs import as_integers
from paxattn.page_table.pages import read_entries
from paxattn.pool import (
    Pool,
    admit_rows,
    leave_behind,
    make_room,
    note_tokens,
    release_rows,
    with_table,
)
from paxattn.quantized import page_dtype
from paxattn.ragged import RaggedBatch, check_same_pool, fitting_rows, ragged_batch
from paxattn.tree import Tree


class LanguageModel(Protocol):
    """What a step needs of a model; `paxattn.models.Decoder` is one, yours may be another.

    `generate`, `Engine` and `KeptPool` need its ``config`` too, with ``vocab_size`` and
    ``max_positions`` (tokens of a sequence at most). They check requests by these; who runs steps
    of his own passes tokens that the model knows.

    If all its layers have a sliding window, and it says so in ``config.windows`` (tokens, for each
    layer), rows give back the pages that all of these have left behind.
    """

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


def check_model(name: str, model: Any) -> None:
    """Check that a model is one, as far as can be seen.

    Raises:
        TypeError: it has not what a `LanguageModel` has.
    """
    parts = "init_cache", "logits", "config.vocab_size", "config.max_positions"
    missing = [] if callable(model) else ["__call__"]
    for part in parts:
        try:
            attrgetter(part)(model)
        except AttributeError:
            missing.append(part)
    if missing:
        raise TypeError(
            f"{name} is a {type(model).__name__} without {', '.join(missing)}: must be a Decoder, "
            "such as the .model of what load() returns, or another step.LanguageModel"
        )


def new_cache(
    model: LanguageModel, *, num_pages: int, page_size: int, dtype: DTypeLike | None
) -> KVCache:
    """Have a model make its cache, and check what it makes.

    Raises:
        TypeError: that is no `KVCache` of that dtype.
    """
    cache = model.init_cache(num_pages=num_pages, page_size=page_size, dtype=dtype)
    name = f"{type(model).__name__}.init_cache"
    if not isinstance(cache, KVCache):
        raise TypeError(f"{name} must return a KVCache, such as init_kv_cache makes, not {cache!r}")
    if dtype is not None and cache.k_pages.dtype != page_dtype(dtype):
        raise TypeError(
            f"{name}(dtype={page_dtype(dtype)}) made pages of {cache.k_pages.dtype}: have it pass "
            "dtype on to init_kv_cache"
        )
    return cache


def logits_of(model: LanguageModel, hidden: jax.Array) -> jax.Array:
    """A model's logits f32[K, vocab_size] of hidden states [K, hidden], checked.

    Raises:
        TypeError: the model returns another shape.
    """
    logits = model.logits(hidden)
    shape = jnp.shape(logits)
    # (a model for steps of one's own need not have a config)
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if len(shape) != 2 or shape[0] != len(hidden) or vocab_size not in (None, shape[1]):
        raise TypeError(
            f"{type(model).__name__}.logits must return [K, config.vocab_size], here "
            f"[{len(hidden)}, {vocab_size}]; it returned {list(shape)}"
        )
    return logits


def call_model(
    model: LanguageModel, tokens: jax.Array, batch: RaggedBatch, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Call a model, and check what it returns.

    Raises:
        TypeError: that is not hidden states ``[T, hidden]`` and the cache.
    """
    out = model(tokens, batch, cache)
    if isinstance(out, tuple) and len(out) == 2 and jnp.shape(out[0])[:-1] == tokens.shape:
        return out
    parts = out if isinstance(out, tuple) else (out,)
    got = ", ".join(str(getattr(part, "shape", type(part).__name__)) for part in parts)
    raise TypeError(
        f"{type(model).__name__}.__call__ must return the hidden states of {tokens.size} tokens, "
        f"[{tokens.size}, hidden], and the cache; it returned {got}"
    )


def window_of(model: LanguageModel) -> int | None:
    """The widest of a model's sliding windows in tokens; None: some layer sees everything."""
    windows = getattr(getattr(model, "config", None), "windows", ())
    return max(windows) if windows and all(windows) else None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PoolUse:
    """How a pool was used, step by step.

    Attributes:
        num_steps: i32[], steps run.
        peak_pages: i32[], most pages held at once.
        page_steps: f32[], pages held, summed over steps.
        token_steps: f32[], tokens of all rows that a window still reaches, summed over steps
            (shared ones once per row).
        row_steps: f32[], rows served, summed over steps.
        cached_tokens: i32[], tokens of prompts that were not computed, because pages held them.
    """

    num_steps: jax.Array
    peak_pages: jax.Array
    page_steps: jax.Array
    token_steps: jax.Array
    row_steps: jax.Array
    cached_tokens: jax.Array

    def at_peak(self, table: PageTable) -> PoolUse:
        """The same step, which held more pages for a while."""
        held = table.num_pages - table.num_free
        return replace(self, peak_pages=jnp.maximum(self.peak_pages, held))

    def after(self, table: PageTable, window: int | None) -> PoolUse:
        """One more step, which left this table; the window is the model's, see `window_of`."""
        held = table.num_pages - table.num_free
        needed = table.kv_lens if window is None else jnp.minimum(table.kv_lens, window)
        return replace(
            self.at_peak(table),
            num_steps=self.num_steps + 1,
            page_steps=self.page_steps + held.astype(jnp.float32),
            token_steps=self.token_steps + jnp.sum(needed.astype(jnp.float32)),
            row_steps=self.row_steps + jnp.sum(table.kv_lens > 0).astype(jnp.float32),
        )


def no_use() -> PoolUse:
    """Before the first step."""

    def zero(dtype: DTypeLike) -> jax.Array:
        return jnp.zeros((), dtype)  # one for each field: a state is donated, buffer by buffer

    return PoolUse(
        num_steps=zero(jnp.int32),
        peak_pages=zero(jnp.int32),
        page_steps=zero(jnp.float32),
        token_steps=zero(jnp.float32),
        row_steps=zero(jnp.float32),
        cached_tokens=zero(jnp.int32),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PackedPrompts:
    """Prompts one after the other, and which of them begin alike (N tokens, R rows).

    Attributes:
        tokens: i32[N], all prompts' tokens.
        starts: i32[R], where each row's prompt begins in ``tokens``; rows may share one.
        sources: i32[R], an earlier row that begins with the same tokens.
        common: i32[R], how many, whole pages of them; 0 where a row shares nothing.
    """

    tokens: jax.Array
    starts: jax.Array
    sources: jax.Array
    common: jax.Array


def run_tokens(
    model: LanguageModel,
    pool: Pool,
    tokens: jax.Array,
    q_lens: jax.Array,
    *,
    live: jax.Array,
    max_q_len: int,
    tree: Tree | None = None,
) -> tuple[Pool, jax.Array]:
    """Write, attend and append, in room that `make_room` made: the second half of `ragged_step`.

    Args:
        model: see `LanguageModel`.
        pool: the pool.
        tokens: i32[T], row after row without gaps, padding at the end.
        q_lens: i32[R], how many of them belong to each row.
        live: bool[R], rows that have room; the tokens of others are computed but not stored.
        max_q_len: static upper bound of ``q_lens``.
        tree: static, see `ragged.ragged_batch`.

    Returns:
        ``(pool, hidden [T, hidden_size])``.

    Raises:
        ValueError: the pages and the table differ in number or page size.
    """
    table = pool.table
    check_same_pool(pool.cache, table)
    batch = ragged_batch(
        table, q_lens, num_tokens=tokens.shape[0], max_q_len=max_q_len, live=live, tree=tree
    )
    hidden, cache = call_model(model, tokens, batch, pool.cache)
    pool = note_tokens(pool, batch.slots, tokens)
    table, _ = page_table.append(table, jnp.where(live, q_lens, 0))
    return replace(pool, table=table, cache=cache), hidden


def ragged_step(
    model: LanguageModel,
    pool: Pool,
    tokens: jax.Array,
    q_lens: jax.Array,
    *,
    live: jax.Array | None = None,
    max_q_len: int | None = None,
    tree: Tree | None = None,
    scrub: bool = False,
) -> tuple[Pool, jax.Array, jax.Array]:
    """Run new tokens of several rows through the model: reserve, copy, write, attend, append.

    Args:
        model: see `LanguageModel`.
        pool: the pages and who owns them; donate it to the enclosing jit.
        tokens: i32[T], row after row without gaps, padding at the end.
        q_lens: i32[R], how many of them belong to each row.
        live: bool[R]; the tokens of other rows are computed but neither stored nor counted.
        max_q_len: static upper bound of ``q_lens``; T by default, 1 for a decode step.
        tree: static, see `ragged.ragged_batch`.
        scrub: see `pool.make_room`.

    Returns:
        ``(pool, hidden [T, hidden_size], ok bool[R])``. A live row for which no room could be had,
        of more than ``max_q_len`` tokens, or whose tokens end beyond T, is not ok: it is left as it
        was, and its hidden states mean nothing.

    Raises:
        ValueError: the pages and the table differ in number or page size, or ``tokens`` or
            ``q_lens`` are not integers on one axis.
    """
    tokens = as_integers("tokens", tokens, None)
    max_q_len = tokens.shape[0] if max_q_len is None else max_q_len
    q_lens = as_integers("q_lens", q_lens, (pool.table.max_seqs,))
    fits = fitting_rows(q_lens, tokens.shape[0], max_q_len)
    stored = fits if live is None else live & fits
    pool, ok = make_room(pool, jnp.where(stored, q_lens, 0), max_new_tokens=max_q_len, scrub=scrub)
    pool, hidden = run_tokens(
        model, pool, tokens, q_lens, live=stored & ok, max_q_len=max_q_len, tree=tree
    )
    return pool, hidden, ok & fits


def shed(model: LanguageModel, pool: Pool, *, scrub: bool) -> Pool:
    """Give back what rows that decode have left behind, see `pool.leave_behind`.

    A pool with a prefix cache keeps it until they end: of a row with gaps nothing is remembered.
    """
    return pool if pool.prefix is not None else leave_behind(pool, window_of(model), scrub=scrub)


def prefill(
    model: LanguageModel,
    pool: Pool,
    use: PoolUse,
    prompts: PackedPrompts,
    lens: jax.Array,
    *,
    chunk: int,
    scrub: bool = False,
) -> tuple[Pool, PoolUse, jax.Array]:
    """Store the rows' tokens, in chunks of packed tokens of as many rows as fit.

    What pages hold already is not computed again: rows start on what the prefix cache has of them,
    and a row that begins like an earlier one waits for it, then shares its pages. Of the rows that
    find no page in a step only the first ends and gives its pages back: they may let the others go
    on. So every step stores tokens, or ends a row, or lets one share.

    Args:
        model: see `LanguageModel`.
        pool: donate it to the enclosing jit.
        use: how the pool was used before.
        prompts: the tokens.
        lens: i32[R], tokens to store; 0 leaves a row as it is. (Their last token, whose logits
            somebody will want, is best left out.)
        chunk: static tokens per step.
        scrub: static; zero the pages of rows that end.

    Returns:
        ``(pool, use, ok bool[R])``; rows that are not ok are empty.
    """
    stored = (lens > 0) & (lens[prompts.sources] >= prompts.common)
    common = jnp.where(stored, prompts.common, 0)
    empty = (lens > 0) & (pool.table.kv_lens == 0)
    pool = admit_rows(pool, empty, prompts.tokens, prompts.starts, lens + 1)
    use = count_cached(use, jnp.where(empty, pool.table.kv_lens, 0))

    def left(pool: Pool, failed: jax.Array) -> jax.Array:
        return jnp.where(failed, 0, jnp.maximum(lens - pool.table.kv_lens, 0))

    def body(carry: tuple) -> tuple:
        pool, use, failed = carry
        held = pool.table.kv_lens
        waits = (held < common) & ~failed & ~failed[prompts.sources]
        ready = waits & (held[prompts.sources] >= common)
        pool = share(pool, prompts.sources, common, ready, scrub=scrub)
        use = count_cached(use, jnp.where(ready, common - held, 0))
        todo = jnp.where(waits & ~ready, 0, left(pool, failed))
        q_lens = jnp.clip(chunk - (jnp.cumsum(todo, dtype=jnp.int32) - todo), 0, todo)
        rows, offsets, _ = page_table.token_rows(q_lens, chunk)
        index = prompts.starts[rows] + pool.table.kv_lens[rows] + offsets
        tokens = prompts.tokens.at[index].get(mode="clip")
        pool, _, ok = ragged_step(model, pool, tokens, q_lens, scrub=scrub)
        use = use.after(pool.table, window_of(model))
        ends = first_only(~ok)
        pool = release_rows(pool, ends, scrub=scrub)
        return pool, use, failed | ends

    pool, use, failed = lax.while_loop(
        lambda carry: jnp.any(left(carry[0], carry[2]) > 0),
        body,
        (pool, use, jnp.zeros(lens.shape, bool)),
    )
    return pool, use, ~failed


def share(
    pool: Pool, sources: jax.Array, common: jax.Array, mask: jax.Array, *, scrub: bool
) -> Pool:
    """Let masked rows hold the first ``common[R]`` tokens of rows ``sources[R]``, and no more."""
    pool = with_table(pool, page_table.reorder(pool.table, sources, mask), scrub=scrub)
    table, _ = page_table.truncate(pool.table, jnp.where(mask, common, -1))
    return with_table(pool, table, scrub=scrub)


def count_cached(use: PoolUse, tokens: jax.Array) -> PoolUse:
    """Add tokens i32[R] that need no computing."""
    return replace(use, cached_tokens=use.cached_tokens + jnp.sum(tokens, dtype=jnp.int32))


def first_only(mask: jax.Array) -> jax.Array:
    """The mask without all but its first True."""
    return mask & (jnp.cumsum(mask) == 1)


def left_alone(table: PageTable) -> jax.Array:
    """Rows whose next token falls in a page that nobody else holds, bool[R]: they need no other.

    So may a row that found no page for a copy: who shared its page has taken a copy in that step.
    """
    rows = jnp.arange(table.max_seqs, dtype=jnp.int32)
    page = read_entries(table, rows, table.kv_lens // table.page_size)
    return table.ref_counts.at[page].get(mode="fill", fill_value=0) == 1
