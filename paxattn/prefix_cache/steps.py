"""Finding cached pages, starting rows on them, and remembering rows' pages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from paxattn.page_table import PageTable, adopt, retain
from paxattn.page_table.inputs import as_integers, as_mask
from paxattn.page_table.pages import is_vacant, varying_like, when
from paxattn.prefix_cache.chains import first_pages, link, next_pages, prefix_hashes
from paxattn.prefix_cache.state import PrefixCache, as_salts, check_sizes
from paxattn.prefix_cache.tokens import as_pages, row_tokens

SIBLINGS = 256  # pages looked at, at most, for one that goes on with part of the tokens
LAST_TICK = 2**30  # of the clock; beyond it, eviction goes by depth alone


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Match:
    """Cached pages that hold the beginning of a prompt.

    Attributes:
      pages: i32[K], in order; `num_pages` past those that hold the `num_tokens`.
      num_full: i32[], how many of them are used from end to end. There is one more if they hold
        fewer than `num_tokens`: a partial hit.
      num_tokens: i32[], tokens found; at least one fewer than the prompt has.
    """

    pages: Array
    num_full: Array
    num_tokens: Array


def match(
    cache: PrefixCache,
    table: PageTable,
    tokens: ArrayLike,
    num_tokens: ArrayLike,
    salt: ArrayLike = 0,
) -> Match:
    """Finds the longest cached beginning of a prompt, and changes nothing.

    Full pages are always found. After them, the cached page that agrees with most of the following
    tokens is looked for among the `SIBLINGS` latest that come after the last full page. At least
    one token is left to compute, for the model to have something to say: of a prompt that is
    cached as a whole the last page is such a partial hit.

    Results hold until the next step that changes cache or table. For several prompts, `jax.vmap`
    over tokens, lengths and salts.

    Args:
      cache: the cache.
      table: the table it belongs to.
      tokens: i32[L], the prompt, padded.
      num_tokens: i32[], tokens in it.
      salt: i32[], only pages inserted with the same salt are found.

    Returns:
      A `Match`, with `ceil(L / page_size)` entries but no more than a row has.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    check_sizes(cache, table)
    salt = as_salts("salt", salt, ())
    num_tokens = as_integers("num_tokens", num_tokens, ())
    tokens, num_tokens = as_pages(table, tokens, num_tokens)
    everything = jax.tree.leaves((cache, tokens, num_tokens, salt))
    tokens, num_tokens, salt = (varying_like(x, *everything) for x in (tokens, num_tokens, salt))
    hashes = prefix_hashes(tokens, salt)
    page_size = cache.page_size
    pages, num_found = find_run(cache, tokens, num_tokens // page_size, salt, hashes)

    num_full = jnp.minimum(num_found, jnp.maximum(num_tokens - 1, 0) // page_size)
    rest = jnp.clip(num_tokens - 1 - num_full * page_size, 0, page_size)
    last, extra = find_partial(cache, tokens, pages, num_full, rest, salt, hashes)
    whole = num_found > num_full  # all of the prompt: its last page, less one token
    last = jnp.where(whole, pages.at[num_full].get(mode="fill", fill_value=0), last)
    extra = jnp.where(whole, rest, extra)
    index = lax.iota(jnp.int32, pages.size)
    pages = jnp.where(index < num_full, pages, cache.num_pages)
    pages = jnp.where((index == num_full) & (extra > 0), last, pages)
    return Match(pages=pages, num_full=num_full, num_tokens=num_full * page_size + extra)


def admit(
    cache: PrefixCache,
    table: PageTable,
    row: ArrayLike,
    tokens: ArrayLike,
    num_tokens: ArrayLike,
    salt: ArrayLike = 0,
) -> tuple[PrefixCache, PageTable, Array]:
    """Starts an empty row on the cached beginning of its prompt: `match`, then `adopt`.

    Args:
      cache: the cache.
      table: the table it belongs to.
      row: i32[], a row that holds no pages.
      tokens: i32[L], the prompt, padded.
      num_tokens: i32[], tokens in it.
      salt: see `match`.

    Returns:
      The cache, the table, and i32[] the prompt's tokens that need no computing, which is also
      the row's length now. Where `row` is out of range or holds pages: no change, and 0.
    """
    row = as_integers("row", row, ())
    vacant = is_vacant(table, jnp.where(row < 0, table.max_seqs, row))
    num_tokens = jnp.where(vacant, as_integers("num_tokens", num_tokens, ()), 0)
    found = match(cache, table, tokens, num_tokens, salt)
    table, _ = adopt(table, row, found.pages, found.num_tokens)
    cache = touch(cache, found.pages)
    asked, saved = (x.astype(jnp.uint32) for x in (num_tokens, found.num_tokens))
    stats = replace(
        cache.stats,
        lookups=cache.stats.lookups + vacant.astype(jnp.uint32),
        hits=cache.stats.hits + (saved > 0).astype(jnp.uint32),
        tokens_asked=cache.stats.tokens_asked + asked,
        tokens_saved=cache.stats.tokens_saved + saved,
    )
    return replace(cache, stats=stats), table, found.num_tokens


def insert(
    cache: PrefixCache, table: PageTable, row: ArrayLike, tokens: ArrayLike, salt: ArrayLike = 0
) -> tuple[PrefixCache, PageTable]:
    """Remembers a row's full pages: those of its `kv_lens` tokens, prompt and generated.

    What is cached already is not cached twice: where another page holds the same tokens after the
    same ones, that page goes on to be the one found, the row keeps its own, and the row's later
    pages come after the cached one. So this may be called at any time, after `append`; after the
    last chunk of a prompt and before `release` is enough to lose nothing.

    Args:
      cache: the cache.
      table: the table it belongs to.
      row: i32[]; without effect where it is out of range.
      tokens: i32[L], the row's tokens from the first on, padded: they must be the ones whose keys
        and values its pages hold. Pages past `L` tokens are not remembered.
      salt: i32[], the one the row was admitted with.

    Returns:
      The cache and the table, in which the cache holds the new pages.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    check_sizes(cache, table)
    row, salt = as_integers("row", row, ()), as_salts("salt", salt, ())
    row = jnp.where(row < 0, table.max_seqs, row)
    length = table.kv_lens.at[row].get(mode="fill", fill_value=0)
    tokens, length = as_pages(table, tokens, length)
    num_full = length // cache.page_size
    hashes = prefix_hashes(tokens, salt)
    found, num_found = find_run(cache, tokens, num_full, salt, hashes)
    index = lax.iota(jnp.int32, found.size)
    own = table.block_tables.at[row].get(mode="fill", fill_value=table.num_pages)[: found.size]
    # A page that is cached as something else stays that, and what follows it is not remembered.
    usable = cache.depths.at[own].get(mode="fill", fill_value=1) == 0
    stop = jnp.min(jnp.where((index < num_found) | usable, num_full, index))
    new = (index >= num_found) & (index < stop)
    path = jnp.where(new, own, jnp.where(index < num_found, found, cache.num_pages))

    cache = touch(cache, path)

    def remember(state: PrefixCache) -> tuple[PrefixCache]:
        pages = jnp.where(new, own, cache.num_pages)
        before = jnp.pad(path[:-1], (1, 0), constant_values=cache.num_pages)
        state = replace(
            state,
            tokens=state.tokens.at[pages].set(tokens, mode="drop"),
            parents=state.parents.at[pages].set(before, mode="drop"),
            salts=state.salts.at[pages].set(salt, mode="drop"),
            depths=state.depths.at[pages].set(index + 1, mode="drop"),
            by_prefix=link(state.by_prefix, own, hashes[1:], new),
            by_parent=link(state.by_parent, own, hashes[:-1], new),
        )
        return (state,)

    (cache,) = when(jnp.any(new), remember, cache)
    count = cache.stats.pages_inserted + jnp.sum(new, dtype=jnp.uint32)
    cache = replace(cache, stats=replace(cache.stats, pages_inserted=count))
    return cache, retain(table, own, new)


def insert_rows(
    cache: PrefixCache,
    table: PageTable,
    mask: ArrayLike,
    tokens: ArrayLike | None,
    salts: ArrayLike,
    lines: ArrayLike | None = None,
) -> tuple[PrefixCache, PageTable]:
    """`insert` for every row in a mask, in row order; costs nothing where there is none.

    Args:
      cache: the cache.
      table: the table it belongs to.
      mask: bool[R].
      tokens: i32[K, L], sequences of tokens as for `insert`; None: those that `write_tokens` noted.
        Rows that have discarded pages have lost the notes too, and are left out then.
      salts: i32[R].
      lines: i32[R], which line of ``tokens`` is a row's; None: the first is the first row's.
    """
    mask = as_mask("mask", mask, (table.max_seqs,))
    salts = as_salts("salts", salts, mask.shape)
    known = None if tokens is None else jnp.asarray(tokens)
    of = jnp.arange(mask.size) if lines is None else as_integers("lines", lines, mask.shape)
    if known is None:
        mask &= (table.kv_lens == 0) | (table.block_tables[:, 0] < table.num_pages)
    elif known.ndim != 2 or (lines is None and known.shape[0] != mask.size):
        raise ValueError(
            f"tokens.shape={known.shape} must be ({mask.size}, L): a line per row of the table"
        )

    def body(state: tuple[PrefixCache, PageTable, Array]) -> tuple[PrefixCache, PageTable, Array]:
        cache, table, left = state
        row = jnp.argmax(left).astype(jnp.int32)
        if known is None:
            line = row_tokens(cache, table, row)
        else:
            line = known.at[of[row]].get(mode="clip")
        cache, table = insert(cache, table, row, line, salts[row])
        return cache, table, left.at[row].set(False)

    return lax.while_loop(lambda state: jnp.any(state[2]), body, (cache, table, mask))[:2]


def touch(cache: PrefixCache, pages: Array) -> PrefixCache:
    """Marks pages as used now; those out of range are skipped."""
    # The clock stops rather than wraps: pages must never look older than their children.
    now = jnp.minimum(cache.clock + 1, LAST_TICK)
    return replace(cache, clock=now, last_used=cache.last_used.at[pages].set(now, mode="drop"))


def find_run(
    cache: PrefixCache, tokens: Array, count: Array, salt: Array, hashes: Array
) -> tuple[Array, Array]:
    """The cached pages of i32[K, P] tokens: i32[K], and how many, at most `count`.

    All pages walk along their chains at once. Whether a candidate's parent is the right page can
    be told once the page before has been found; a candidate with other tokens is left at once.
    """
    num_pages = cache.num_pages
    index = lax.iota(jnp.int32, tokens.shape[0])

    def walk(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        candidates, _, _ = state
        same = is_at(cache.salts, candidates, salt)
        same &= jnp.all(is_at(cache.tokens, candidates, tokens), axis=1)
        before = jnp.pad(candidates[:-1], (1, 0), constant_values=num_pages)
        linked = is_at(cache.parents, candidates, before)
        found = jnp.min(jnp.where(same & linked, index.size, index))
        wrong = ~same | (~linked & (index == found))
        alive = candidates.at[found].get(mode="fill", fill_value=num_pages) < num_pages
        moved = jnp.where(wrong, next_pages(cache.by_prefix, candidates), candidates)
        return moved, found, alive

    pages = jnp.where(index < count, first_pages(cache.by_prefix, hashes[1:]), num_pages)
    state = (pages, jnp.zeros_like(count), count > 0)
    pages, found, _ = lax.while_loop(lambda state: state[2], walk, state)
    return jnp.where(index < found, pages, num_pages), found


def find_partial(
    cache: PrefixCache,
    tokens: Array,
    pages: Array,
    num_full: Array,
    rest: Array,
    salt: Array,
    hashes: Array,
) -> tuple[Array, Array]:
    """The page after `num_full` ones that agrees with most of the next `rest` tokens: it, how many.

    Only the first `SIBLINGS` of the chain are looked at, so that nobody pays for the number of
    prompts that go on from the same page.
    """
    num_pages = cache.num_pages
    last = jnp.where(num_full > 0, num_full - 1, pages.size)
    parent = pages.at[last].get(mode="fill", fill_value=num_pages)
    wanted = tokens.at[num_full].get(mode="fill", fill_value=0)
    index = lax.iota(jnp.int32, wanted.size)

    def look(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        page, looked, best, most = state
        agrees = (index < rest) & is_at(cache.tokens, page, wanted)
        count = jnp.min(jnp.where(agrees, index.size, index))
        follows = is_at(cache.parents, page, parent) & is_at(cache.salts, page, salt)
        better = follows & (count > most)
        return (
            next_pages(cache.by_parent, page),
            looked + 1,
            jnp.where(better, page, best),
            jnp.where(better, count, most),
        )

    def goes_on(state: tuple[Array, ...]) -> Array:
        page, looked, _, most = state
        return (page < num_pages) & (looked < SIBLINGS) & (most < rest)

    none = jnp.zeros_like(num_full)
    start = first_pages(cache.by_parent, hashes.at[num_full].get(mode="promise_in_bounds"))
    _, _, best, most = lax.while_loop(goes_on, look, (start, none, parent, none))
    return best, most


def is_at(array: Array, pages: Array, values: Array) -> Array:
    """Whether a field of pages has these values; not where there is no page."""
    got = array.at[pages].get(mode="fill", fill_value=0)
    inside = pages < array.shape[0]
    return (got == values) & inside.reshape(inside.shape + (1,) * (got.ndim - inside.ndim))
