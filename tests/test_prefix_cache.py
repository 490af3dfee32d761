"""Every line of the prefix cache's contract, and a trace whose best hit rate is known."""

from __future__ import annotations

import dataclasses
import random
import re
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from paxattn import page_table as pt
from paxattn import prefix_cache as pc
from paxattn.prefix_cache import chains, steps

N, P, R, M = 12, 4, 4, 5  # the shapes that most tests share, so that steps compile once
L = M * P
MANY = pc.SIBLINGS + pc.EVICTION_SHARE  # pages, where many are needed

MATCH, ADMIT, INSERT, EVICT, CLEAR = map(
    jax.jit, (pc.match, pc.admit, pc.insert, pc.evict, pc.clear)
)
RESERVE = jax.jit(pc.reserve, static_argnames="max_new_pages")
PLAIN_RESERVE = jax.jit(pt.reserve, static_argnames="max_new_pages")
APPEND, RELEASE, TRUNCATE, RETAIN = map(jax.jit, (pt.append, pt.release, pt.truncate, pt.retain))


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def i32(values):
    return np.asarray(values, np.int32)


def padded(tokens, size=L):
    return i32((list(tokens) + [-7] * size)[:size])


class Host:
    """A cache and a table, their steps checked as they run."""

    def __init__(self, num_pages=N, page_size=P, rows=R, width=M, **options):
        self.table = pt.init_page_table(
            num_pages=num_pages, page_size=page_size, max_seqs=rows, max_pages_per_seq=width
        )
        self.cache = pc.init_prefix_cache(num_pages=num_pages, page_size=page_size, **options)

    def check(self):
        pt.check_invariants(self.table, pc.held(self.cache))
        pc.check_cache(self.cache)

    def pad(self, tokens):
        return padded(tokens, self.table.max_pages_per_seq * self.table.page_size)

    def one(self, row, n):
        return i32([n if r == row else 0 for r in range(self.table.max_seqs)])

    def reserve(self, *new):
        new = i32(list(new) + [0] * (self.table.max_seqs - len(new)))
        self.cache, self.table, ok, copies = RESERVE(
            self.cache, self.table, new, max_new_pages=self.table.max_pages_per_seq
        )
        self.check()
        n = int(copies.count)
        pairs = zip(np.asarray(copies.src)[:n], np.asarray(copies.dst)[:n], strict=True)
        return np.asarray(ok).tolist(), [(int(a), int(b)) for a, b in pairs]

    def grow(self, row, n):
        ok, copies = self.reserve(*self.one(row, n))
        assert all(ok)
        self.table, ok = APPEND(self.table, self.one(row, n))
        assert np.asarray(ok).all()
        return copies

    def leave_free(self, count):
        """Lets the last two rows take all other pages (so that few shapes are compiled)."""
        taken = int(self.table.num_free) - count
        last = min(taken, M)
        assert all(self.reserve(*[0] * (R - 2), (taken - last) * P, last * P)[0])
        assert self.table.num_free == count

    def insert(self, row, tokens, salt=0):
        self.cache, self.table = INSERT(self.cache, self.table, row, self.pad(tokens), salt)
        self.check()

    def release(self, *rows):
        self.table = RELEASE(self.table, np.isin(np.arange(self.table.max_seqs), rows))
        self.check()

    def put(self, tokens, salt=0, row=0):
        """Runs a whole request: what it computed stays cached."""
        done = self.admit(row, tokens, salt)
        self.grow(row, len(tokens) - done)
        self.insert(row, tokens, salt)
        pages = self.pages(row)
        self.release(row)
        return pages

    def match(self, tokens, salt=0):
        found = MATCH(self.cache, self.table, self.pad(tokens), len(tokens), salt)
        pages = np.asarray(found.pages)
        pages = pages[pages < self.table.num_pages].tolist()
        assert len(pages) == -(-int(found.num_tokens) // self.table.page_size)
        assert found.num_full == int(found.num_tokens) // self.table.page_size
        return pages, int(found.num_tokens)

    def admit(self, row, tokens, salt=0):
        self.cache, self.table, done = ADMIT(
            self.cache, self.table, row, self.pad(tokens), len(tokens), salt
        )
        self.check()
        return int(done)

    def evict(self, count):
        """The pages evicted."""
        before = self.cached()
        self.cache, self.table, freed = EVICT(self.cache, self.table, count)
        self.check()
        gone = before - self.cached()
        assert len(gone) == freed
        return gone

    def cached(self):
        return set(np.flatnonzero(np.asarray(pc.held(self.cache))).tolist())

    def pages(self, row):
        entries = np.asarray(self.table.block_tables)[row]
        return entries[entries < self.table.num_pages].tolist()

    def stats(self):
        return {name: int(x) for name, x in vars(self.cache.stats).items()}


A = [1, 2, 3, 4]
B = [5, 6, 7, 8]
C = [9, 10, 11, 12]
D = [13, 14, 15, 16]


# Making a cache, and wrong arguments.


@pytest.mark.parametrize("name", ["num_pages", "page_size", "num_buckets"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_sizes_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        pc.init_prefix_cache(**{"num_pages": N, "page_size": P, "num_buckets": 3, name: value})


def test_size_in_bytes_is_as_documented():
    cache = pc.init_prefix_cache(num_pages=1000, page_size=16, num_buckets=512)
    total = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert 0 <= total - 4 * (1000 * (16 + 6) + 2 * 512) <= 64


@pytest.mark.parametrize("sizes", [{"num_pages": N + 1}, {"page_size": P - 1}])
@pytest.mark.parametrize("step", ["match", "admit", "insert", "reserve", "evict", "clear"])
def test_a_cache_of_other_sizes_is_refused(step, sizes):
    table = Host().table
    cache = pc.init_prefix_cache(**({"num_pages": N, "page_size": P} | sizes))
    arguments = {
        "match": (padded(A), 4),
        "admit": (0, padded(A), 4),
        "insert": (0, padded(A)),
        "reserve": (i32([1] * R),),
        "evict": (1,),
        "clear": (),
    }
    with pytest.raises(ValueError, match="make both with the same sizes"):
        getattr(pc, step)(cache, table, *arguments[step])


def test_shapes_and_dtypes_are_checked():
    host = Host()
    with pytest.raises(ValueError, match="tokens must be integers"):
        pc.match(host.cache, host.table, np.zeros(L, np.float32), 4)
    with pytest.raises(ValueError, match="tokens has shape"):
        pc.insert(host.cache, host.table, 0, np.zeros((2, L), np.int32))
    with pytest.raises(ValueError, match="salt has shape"):
        pc.match(host.cache, host.table, padded(A), 4, i32([1]))
    with pytest.raises(ValueError, match=r"tokens\.shape"):
        pc.insert_rows(
            host.cache, host.table, np.ones(R, bool), np.zeros((R - 1, L), np.int32), i32([0] * R)
        )


# Matching.


def test_nothing_is_found_in_an_empty_cache():
    assert Host().match(A + B) == ([], 0)


def test_the_longest_run_of_full_pages_is_found():
    host = Host()
    pages = host.put(A + B + C)
    assert host.match(A + B + C + D) == (pages, 12)
    assert host.match(A + B + D) == (pages[:2], 8)
    assert host.match(A + D + C) == (pages[:1], 4)
    assert host.match(D + B + C) == ([], 0)


def test_a_page_is_found_after_its_parent_only():
    host = Host()
    first, second = host.put(A + B), host.put(C + B)
    assert len(host.cached()) == 4
    assert host.match(A + B + D) == (first, 8)
    assert host.match(C + B + D) == (second, 8)
    assert host.match(B + B + D) == ([], 0)
    assert host.match(A + A + D) == (first[:1], 4)


@pytest.mark.parametrize("length", range(13))
def test_one_token_is_left_to_compute(length):
    host = Host()
    pages = host.put(A + B + C)
    expected = max(0, length - 1)
    assert host.match((A + B + C)[:length]) == (pages[: -(-expected // P)], expected)


@pytest.mark.variants
def test_one_token_is_left_to_compute_with_pages_of_one_token():
    host = Host(num_pages=6, page_size=1, width=4)
    pages = host.put([1, 2, 3])
    assert host.match([1, 2, 3]) == (pages[:2], 2)
    assert host.match([1, 2, 3, 4]) == (pages, 3)
    assert host.match([1]) == ([], 0)


def test_a_page_that_goes_on_with_some_of_the_tokens_is_a_partial_hit():
    host = Host()
    one, two = host.put([*A, 5, 6, 0, 0]), host.put([*A, 5, 6, 7, 0])
    assert one[0] == two[0]
    assert host.match([*A, 5, 6, 7, 8, 9]) == (two, 7)
    assert host.match([*A, 5, 6, 0, 1, 9]) == (one, 7)
    assert host.match([*A, 5, 6, 7, 0]) == (two, 7)  # all of it, less one
    assert host.match([*A, 5, 6])[1] == 5
    assert host.match([*A, 6, 5, 7]) == (one[:1], 4)
    assert host.match([1, 2, 9]) == (one[:1], 2)


@pytest.mark.variants
def test_partial_hits_are_looked_for_among_the_latest_full_pages_among_all():
    host = Host(num_pages=MANY)
    for i in range(pc.SIBLINGS + 1):
        host.put([*A, 100 + i, 5, 5, 5])
    assert host.match([*A, 100, 5, 6, 6])[1] == 4
    assert host.match([*A, 101, 5, 6, 6])[1] == 6
    assert host.match([*A, 100, 5, 5, 5, 6])[1] == 8


def test_padding_and_what_follows_the_prompt_mean_nothing():
    host = Host()
    pages = host.put(A + B + C)
    found = MATCH(host.cache, host.table, padded(A + B + C), 6, 0)
    assert found.num_tokens == 5
    assert np.asarray(found.pages).tolist() == pages[:2] + [N] * 3
    for length in (-1, -(2**31)):
        assert MATCH(host.cache, host.table, padded(A + B + C), length, 0).num_tokens == 0
    assert MATCH(host.cache, host.table, padded(A + B + C), 2**31 - 1, 0).num_tokens == 12
    # Prompts that are no multiple of a page long, and longer than a row.
    short = MATCH(host.cache, host.table, i32(A + B[:3]), 7)
    assert (short.pages.shape, int(short.num_tokens)) == ((2,), 6)
    long = MATCH(host.cache, host.table, padded(A + B, L + 30), 9)
    assert (long.pages.shape, int(long.num_tokens)) == ((M,), 8)


def test_salts_isolate_tenants_both_ways():
    host = Host()
    mine, theirs = host.put(A + B, salt=1), host.put(A + B, salt=-2)
    assert not set(mine) & set(theirs)
    assert host.match(A + B + C, salt=1) == (mine, 8)
    assert host.match(A + B + C, salt=-2) == (theirs, 8)
    for salt in (0, 2, -1):
        assert host.match(A + B + C, salt=salt) == ([], 0)
        assert host.match([*A[:3], 0], salt=salt) == ([], 0)  # no partial hit, either


@pytest.mark.parametrize(
    "salt", [2**31, -(2**31) - 1, np.int64(2**40), np.uint64(2**63), np.uint32(2**31)]
)
def test_salts_that_an_int32_would_make_one_are_refused(salt):
    host = Host()
    for x64 in (False, True):
        with jax.enable_x64(x64), pytest.raises(ValueError, match="salt"):
            pc.match(host.cache, host.table, padded(A), 4, salt)


def colliding_pages():
    """Two pages of tokens with the same 32 bits of hash, found by trying."""
    tokens = np.random.default_rng(0).integers(0, 50_000, (300_000, 1, P)).astype(np.int32)
    hashes = np.asarray(
        jax.jit(jax.vmap(chains.prefix_hashes, (0, None)))(tokens, np.int32(0))[:, 1]
    )
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    a, b = tokens[order[same[0]]], tokens[order[same[0] + 1]]
    assert (a != b).any()
    return a.ravel().tolist(), b.ravel().tolist()


def test_pages_of_equal_hash_are_not_shared():
    one, two = colliding_pages()
    host = Host()
    pages = host.put(one + A)
    assert host.match(one + B) == (pages[:1], 4)
    assert host.match(two + A + B)[1] == common(one, two)
    others = host.put(two + A)
    assert not set(pages[1:]) & set(others)
    assert host.match(one + A + B) == (pages, 8)
    assert host.match(two + A + B) == (others, 8)


@pytest.mark.parametrize("weak", ["one bucket", "hash"])
def test_with_all_hashes_equal_everything_is_found_and_nothing_else(weak, monkeypatch):
    if weak == "hash":
        monkeypatch.setattr(
            steps, "prefix_hashes", lambda tokens, salt: jnp.zeros(len(tokens) + 1, jnp.uint32)
        )
    # A number that no other test uses, so that the steps are traced anew.
    host = Host(num_pages=40, num_buckets=1 if weak == "one bucket" else 41)
    rng, stored = random.Random(0), []
    for _ in range(12):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(4, 17))]
        salt = rng.randrange(2)
        host.put(tokens, salt)
        stored.append((salt, tokens[: len(tokens) // P * P]))
    for _ in range(60):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 17))]
        salt = rng.randrange(2)
        expected = max(
            (common(known, tokens[:-1]) for other, known in stored if other == salt), default=0
        )
        assert host.match(tokens, salt)[1] == expected


def common(a, b):
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def test_many_prompts_are_matched_at_once_by_vmap():
    host = Host()
    host.put(A + B + C)
    host.put(A + D, salt=3)
    prompts = [(A + B + C + D, 0), (A + D, 3), (A + D, 0), (D, 0), ([], 3)]
    found = jax.jit(jax.vmap(pc.match, (None, None, 0, 0, 0)))(
        host.cache,
        host.table,
        np.stack([padded(tokens) for tokens, _ in prompts]),
        i32([len(tokens) for tokens, _ in prompts]),
        i32([salt for _, salt in prompts]),
    )
    for i, (tokens, salt) in enumerate(prompts):
        one = MATCH(host.cache, host.table, padded(tokens), len(tokens), salt)
        mine = {name: x[i] for name, x in vars(found).items()}
        jax.tree.map(np.testing.assert_array_equal, mine, vars(one))


# Remembering.


def test_only_full_pages_are_remembered():
    host = Host()
    host.grow(0, 11)
    host.reserve(8)  # spare pages
    host.insert(0, A + B + C)
    assert host.cached() == set(host.pages(0)[:2])
    assert np.asarray(host.table.ref_counts)[host.pages(0)[:3]].tolist() == [2, 2, 1]


def test_pages_are_remembered_as_they_fill():
    host = Host()
    tokens, seen = A + B + C, []
    for _ in tokens:
        host.grow(0, 1)
        host.insert(0, tokens)
        seen.append(len(host.cached()))
    assert seen == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_inserting_twice_changes_nothing_but_the_time_of_use():
    host = Host()
    host.grow(0, 9)
    host.insert(0, A + B + C)
    before = host.cache, host.table
    host.insert(0, A + B + C)
    jax.tree.map(np.testing.assert_array_equal, host.table, before[1])
    same = dataclasses.replace(host.cache, clock=before[0].clock, last_used=before[0].last_used)
    jax.tree.map(np.testing.assert_array_equal, same, before[0])


def test_what_is_cached_already_is_not_cached_twice():
    host = Host()
    # Two requests with the same beginning at the same time: each computes it for itself.
    host.grow(0, 8)
    host.grow(1, 12)
    host.insert(0, A + B)
    host.insert(1, A + B + C)
    first, second = host.pages(0), host.pages(1)
    assert not set(first) & set(second)
    assert host.cached() == {*first, second[2]}
    assert host.match(A + B + C + D) == ([*first, second[2]], 12)
    assert np.asarray(host.table.ref_counts)[second].tolist() == [1, 1, 2]
    host.release(1)
    assert host.match(A + B + C + D) == ([*first, second[2]], 12)


def test_a_page_is_remembered_as_one_thing_only():
    host = Host()
    host.grow(0, 8)
    host.insert(0, A + B, salt=1)
    host.insert(0, A + B, salt=2)
    assert host.match(A + B + C, salt=2) == ([], 0)
    assert host.match(A + B + C, salt=1) == (host.pages(0), 8)


@pytest.mark.parametrize("row", [-1, R, 2**31 - 1, -(2**31)])
def test_rows_out_of_range_have_no_effect(row):
    host = Host()
    host.grow(R - 1, 8)
    host.insert(row, A + B)
    assert not host.cached()
    host.insert(R - 1, A + B)
    held = host.table
    assert host.admit(row, A + B) == 0
    jax.tree.map(np.testing.assert_array_equal, host.table, held)
    assert host.stats()["lookups"] == 0


def test_pages_past_the_tokens_passed_are_not_remembered():
    host = Host()
    host.grow(0, 12)
    host.cache, host.table = INSERT(host.cache, host.table, 0, i32(A + B[:2]))
    host.check()
    assert host.cached() == {host.pages(0)[0]}


def test_insert_rows_is_insert_for_each():
    tokens = [A + B + C, A + B + D, A + C, D]
    hosts = Host(), Host()
    for host in hosts:
        for row, text in enumerate(tokens):
            host.grow(row, len(text))
    one, all_at_once = hosts
    salts = [0, 0, 0, 5]
    for row in (0, 1, 3):
        one.insert(row, tokens[row], salts[row])
    both = jax.jit(pc.insert_rows)(
        all_at_once.cache,
        all_at_once.table,
        np.asarray([True, True, False, True]),
        np.stack([padded(text) for text in tokens]),
        i32(salts),
    )
    jax.tree.map(np.testing.assert_array_equal, both, (one.cache, one.table))


# Starting rows, and copy-on-write.


def test_admit_starts_a_row_on_the_pages_found():
    host = Host()
    pages = host.put(A + B + C)
    assert host.admit(2, A + B + D) == 8
    assert host.pages(2) == pages[:2]
    assert np.asarray(host.table.kv_lens).tolist() == [0, 0, 8, 0]
    assert host.admit(2, A + B + D) == 0  # not empty any more
    assert host.pages(2) == pages[:2]
    assert host.stats() == {
        "lookups": 2,
        "hits": 1,
        "tokens_asked": 24,
        "tokens_saved": 8,
        "pages_inserted": 3,
        "pages_evicted": 0,
    }


def test_the_first_write_into_a_shared_page_copies_exactly_that_page():
    host = Host()
    pages = host.put(A + B + C)
    assert host.admit(0, A + B + C) == 11
    copies = host.grow(0, 1)
    assert [src for src, _ in copies] == [pages[2]]
    assert host.pages(0) == [*pages[:2], copies[0][1]]
    assert host.grow(0, 1) == []  # its own now
    assert host.match(A + B + C + D) == (pages, 12)


def test_going_on_after_full_pages_copies_nothing():
    host = Host()
    host.put(A + B)
    assert host.admit(0, A + B + C) == 8
    assert host.grow(0, 4) == []


def test_a_row_cut_back_into_a_cached_page_does_not_write_into_it():
    host = Host()
    host.grow(0, 12)
    host.insert(0, A + B + C)
    pages = host.pages(0)
    host.table, _ = TRUNCATE(host.table, i32([6, -1, -1, -1]))
    host.check()
    assert [src for src, _ in host.grow(0, 2)] == [pages[1]]
    assert host.match(A + B + C + D) == (pages, 12)


# Eviction.


def test_the_least_recently_used_go_first_and_leaves_before_parents():
    host = Host()
    a1, a2, a3 = host.put(A + B + C)
    _, b2 = host.put(A + D)
    (c1,) = host.put(D)
    host.admit(0, A + B + B)  # uses a1 and a2
    host.release(0)
    order = [page for _ in range(5) for page in host.evict(1)]
    assert order == [a3, b2, c1, a2, a1]
    assert host.evict(1) == set()
    assert host.table.num_free == N
    assert host.stats()["pages_evicted"] == 5


@pytest.mark.parametrize("count", range(7))
def test_evicting_at_once_is_evicting_one_by_one(count):
    one, many = Host(), Host()
    for host in (one, many):
        for tokens in (A + B + C, A + D, D, A + B + D):
            host.put(tokens)
    singly = set()
    for _ in range(count):
        singly |= one.evict(1)
    assert many.evict(count) == singly
    assert len(singly) == min(count, 6)


def test_pages_that_somebody_holds_stay_with_all_before_them():
    host = Host()
    host.put(A + B + C)
    host.put(D + D)
    host.admit(0, A + B + D)
    assert len(host.evict(100)) == 3
    assert host.cached() == set(host.pages(0))
    # A row with pages of its own before a cached one: those cached for it must stay, too.
    host = Host()
    host.grow(0, 8)
    host.grow(1, 12)
    host.insert(0, A + B)
    host.insert(1, A + B + C)
    host.release(0)
    assert host.evict(100) == set()
    host.release(1)
    assert len(host.evict(100)) == 3


def test_a_page_used_again_after_eviction_is_nobodys_parent():
    host = Host()
    host.leave_free(4)
    old = host.put(A + B + C)
    host.evict(3)
    new = host.put(D + C + B)
    assert set(old) == set(new)
    for tokens in (A + B + C + D, D + B + C + D, A + C + B + D):
        assert host.match(tokens)[1] == (4 if tokens[0] == D[0] else 0)
    assert host.match(D + C + B + A) == (new, 12)


def test_reserve_evicts_only_when_short_and_only_what_is_missing():
    host = Host()
    host.put(A + B + C)
    host.put(D + D + D)
    assert host.table.num_free == 6
    assert host.reserve(L, 4) == ([True] * R, [])
    assert len(host.cached()) == 6
    assert host.reserve(L, 8) == ([True] * R, [])
    assert len(host.cached()) == 5
    assert host.stats()["pages_evicted"] == 1


def test_evictions_are_amortised_over_a_share_of_the_pool():
    host, share = Host(num_pages=MANY), MANY // pc.EVICTION_SHARE
    assert share == M
    for i in range(pc.EVICTION_SHARE):
        host.put([100 + i] * L)
    assert host.table.num_free == 0
    host.reserve(1)
    assert host.table.num_free == share - 1
    assert host.stats()["pages_evicted"] == share
    assert host.match([100] * L)[1] == 0
    assert host.match([101] * L)[1] == L - 1


def test_rows_that_cannot_be_served_evict_nothing():
    host = Host()
    host.put(A + B + C)
    assert host.reserve(-1, L + 1, 0, 2**31 - 1)[0] == [False, False, True, False]
    assert len(host.cached()) == 3
    # Two rows fit, and nothing could make the third fit.
    assert host.reserve(L, 16, L)[0] == [True, True, False, True]
    assert len(host.cached()) == 3
    assert host.reserve(L, L, 16)[0] == [True, True, False, True]
    assert len(host.cached()) == 2


def test_pages_that_only_the_cache_holds_count_as_free():
    host = Host()
    host.put(A + B + C + D)
    host.put(D + A + B + C)
    host.put(C + D + A + B)
    assert host.table.num_free == 0
    assert host.reserve(L, L, 8) == ([True] * R, [])
    assert not host.cached()


def test_a_cached_parent_of_a_rows_page_does_not_make_a_request_fail():
    host = Host()
    host.leave_free(6)
    host.grow(0, 8)
    host.grow(1, 12)
    host.insert(0, A + B)
    host.insert(1, A + B + C)
    host.release(0)
    assert host.table.num_free == 1
    assert host.evict(1) == set()
    assert host.reserve(12) == ([True] * R, [])
    assert not host.cached()
    host.insert(1, A + B + C)  # remembered again, with its own pages
    assert host.match(A + B + C + D) == (host.pages(1), 12)


def test_a_row_that_shares_with_the_cache_alone_never_fails_for_want_of_a_copy():
    host = Host()
    host.leave_free(3)
    pages = host.put(A + B + C)
    assert host.admit(0, A + B + C) == 11
    assert host.grow(0, 1) == []
    assert host.pages(0) == pages
    assert not host.cached()


def test_when_rows_hold_everything_the_cache_keeps_what_it_knows():
    host = Host()
    host.leave_free(3)
    host.grow(0, 12)
    host.insert(0, A + B + C)
    assert host.reserve(0, 4)[0] == [True, False, True, True]
    assert len(host.cached()) == 3


def test_reserve_is_the_plain_one_when_there_is_room():
    host = Host()
    host.put(A + B + C)
    host.admit(1, A + B + C)
    new = i32([3, 2, 0, 9])
    plain = PLAIN_RESERVE(host.table, new, max_new_pages=M)
    cache, *ours = RESERVE(host.cache, host.table, new, max_new_pages=M)
    jax.tree.map(np.testing.assert_array_equal, tuple(ours), plain)
    jax.tree.map(np.testing.assert_array_equal, cache, host.cache)


def test_clear_returns_every_hold():
    host = Host()
    host.put(A + B + C)
    host.admit(0, A + B + C)
    stats = host.stats()
    host.cache, host.table = CLEAR(host.cache, host.table)
    host.check()
    assert not host.cached()
    assert host.table.num_free == N - 3
    assert host.stats() == stats
    host.release(0)
    assert host.table.num_free == N
    assert host.match(A + B + C) == ([], 0)


def test_holders_that_are_neither_rows_nor_the_cache_keep_pages():
    host = Host()
    pages = host.put(A + B + C)
    host.table = RETAIN(host.table, i32(pages[1:2]), np.asarray([True]))
    cache, table, freed = EVICT(host.cache, host.table, 3)
    assert freed == 1
    held = np.asarray(pc.held(cache))
    assert np.flatnonzero(held).tolist() == sorted(pages[:2])
    pt.check_invariants(table, held + np.bincount(pages[1:2], minlength=N))


def test_a_clock_that_has_run_out_still_evicts_leaves_first():
    host = Host()
    host.cache = dataclasses.replace(host.cache, clock=jnp.int32(steps.LAST_TICK - 1))
    for tokens in (A + B + C, A + D, D):
        host.put(tokens)
    assert host.cache.clock == steps.LAST_TICK
    for _ in range(5):
        assert len(host.evict(1)) == 1


# Inside JAX's transformations.


def test_the_steps_run_donated_inside_scan():
    prompts = np.stack([padded(text) for text in (A + B, A + B + C, A + B + C + D, A + D)])
    lens = i32([8, 12, 16, 8])

    def serve(state, prompt):
        cache, table = state
        tokens, length = prompt
        cache, table, done = pc.admit(cache, table, 0, tokens, length)
        new = jnp.where(jnp.arange(R) == 0, length - done, 0)
        cache, table, ok, _ = pc.reserve(cache, table, new, max_new_pages=M)
        table, _ = pt.append(table, new)
        cache, table = pc.insert(cache, table, 0, tokens)
        return (cache, pt.release(table, jnp.arange(R) == 0)), (done, jnp.all(ok))

    host = Host()
    run = jax.jit(partial(lax.scan, serve), donate_argnums=0)
    (host.cache, host.table), (done, ok) = run((host.cache, host.table), (prompts, lens))
    host.check()
    assert np.asarray(done).tolist() == [0, 8, 12, 4]
    assert np.asarray(ok).all()
    assert host.stats()["tokens_saved"] == 24


def test_a_step_does_not_copy_the_pool():
    """No copy of an array over pages or buckets in the compiled loop, but in what evicts."""
    size, buckets = 5003, 7001
    host = Host(num_pages=size, num_buckets=buckets)

    def loop(cache, table, tokens, new):
        def step(_, state):
            cache, table, _ = pc.admit(*state, 0, tokens, 9)
            cache, table = pc.insert(cache, table, 1, tokens)
            cache, table, _, _ = pc.reserve(cache, table, new)
            return cache, pt.append(table, new)[0]

        return lax.fori_loop(0, 9, step, (cache, table))

    compiled = jax.jit(loop, donate_argnums=(0, 1)).lower(
        host.cache, host.table, padded(A), i32([1] * R)
    )
    parts, name = {}, ""
    for line in compiled.compile().as_text().splitlines():
        if (start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*{$", line)) is not None:
            name = start[2]
        parts.setdefault(name, []).append(line)

    def calls(name, seen):
        """Everything called from there, but for the eviction: its state starts with `depths`."""
        if name not in seen:
            seen.add(name)
            for line in parts[name]:
                called = re.findall(r"%?([\w.\-]+)", line.partition("), ")[2])
                if evicting.search(line):
                    evicts.extend(c for c in called if c in parts and c != called[1])
                    called = called[:2]
                for other in called:
                    if other in parts:
                        calls(other, seen)
        return seen

    evicting = re.compile(rf"= \(pred\[\]\S* s32\[{size}\]\S* s32\[{buckets}\].* while\(")
    evicts = []
    (body,) = {m[1] for m in re.finditer(r"body=%?([\w.\-]+)", "\n".join(parts[entry_of(parts)]))}
    checked = calls(body, set())
    assert len(evicts) == 1
    copies = re.compile(rf"\[({size}|{buckets})[,\]].* copy\(")
    found = [line for part in checked for line in parts[part] if copies.search(line)]
    assert not found
    # What evicts may copy: so the pattern is the right one.
    assert any(copies.search(line) for part in calls(evicts[0], set()) for line in parts[part])


def entry_of(parts):
    return next(name for name, lines in parts.items() if lines[0].startswith("ENTRY"))


# Checks of the checks.


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("parents", N + 1, "parents out of range"),
        ("parents", N, "depth 1"),
        ("depths", 3, "another depth"),
        ("salts", 1, "another salt"),
        ("last_used", 0, "older than their children"),
        ("last_used", 99, "in the future"),
        ("depths", 0, "parents forgotten"),
    ],
)
def test_check_cache_finds_what_is_wrong(field, value, message):
    host = Host()
    pages = host.put(A + B + C)
    wrong = np.asarray(getattr(host.cache, field)).copy()
    wrong[pages[1]] = value
    with pytest.raises(pt.InvariantError, match=message):
        pc.check_cache(dataclasses.replace(host.cache, **{field: jnp.asarray(wrong)}))


def test_check_cache_finds_pages_missing_from_the_index():
    host = Host()
    host.put(A + B)
    empty = chains.init_chains(N, 2 * N)
    with pytest.raises(pt.InvariantError, match="by_parent lists 0 pages, 2 are cached"):
        pc.check_cache(dataclasses.replace(host.cache, by_parent=empty))


# A trace.


def conversations(seed=0, count=10, turns=5):
    """Prompts and replies: ten conversations taking turns, under three system prompts."""
    rng = random.Random(seed)

    def words(low, high):
        return [rng.randrange(100) for _ in range(rng.randrange(low, high))]

    system = [words(9, 30) for _ in range(3)]
    history = [list(system[i % 3]) for i in range(count)]
    trace = []
    for _ in range(turns):
        for i in rng.sample(range(count), count):
            history[i] += words(3, 12)
            reply = words(3, 12)
            trace.append((list(history[i]), reply))
            history[i] += reply
    return trace


def best_possible(trace, page_size):
    """Tokens that each prompt finds if nothing is ever evicted: its longest beginning in the full
    pages of anything that was computed before."""
    known, saved = [], []
    for prompt, reply in trace:
        saved.append(max((common(other, prompt[:-1]) for other in known), default=0))
        whole = prompt + reply
        known.append(whole[: len(whole) // page_size * page_size])
    return saved


@pytest.fixture(scope="module")
def serve():
    @jax.jit
    def serve(cache, table, tokens, length, total):
        cache, table, done = pc.admit(cache, table, 0, tokens, length)
        new = (total - done)[None]
        cache, table, ok, _ = pc.reserve(cache, table, new, max_new_pages=table.max_pages_per_seq)
        table, _ = pt.append(table, new)
        cache, table = pc.insert(cache, table, 0, tokens)
        return cache, pt.release(table, jnp.ones(1, bool)), done, ok[0]

    def run(trace, num_pages):
        """Tokens saved of each prompt, in a pool of which only so many pages are free."""
        host = Host(num_pages=512, rows=1, width=40)
        taken = np.arange(512) < 512 - num_pages
        host.table = dataclasses.replace(
            host.table, ref_counts=jnp.asarray(taken, jnp.int32), num_free=jnp.int32(num_pages)
        )
        saved = []
        for prompt, reply in trace:
            tokens = host.pad(prompt + reply)
            host.cache, host.table, done, ok = serve(
                host.cache, host.table, tokens, len(prompt), np.int32(len(prompt + reply))
            )
            assert ok
            saved.append(int(done))
        pc.check_cache(host.cache)
        pt.check_invariants(host.table, np.asarray(pc.held(host.cache)) + taken)
        assert host.stats()["tokens_saved"] == sum(saved)
        assert host.stats()["tokens_asked"] == sum(len(prompt) for prompt, _ in trace)
        return saved

    return run


def test_a_trace_of_conversations_reaches_the_best_possible_hit_rate(serve):
    trace = conversations()
    best = best_possible(trace, P)
    asked = sum(len(prompt) for prompt, _ in trace)
    assert sum(best) > 0.6 * asked
    assert serve(trace, 512) == best


def test_the_hit_rate_degrades_smoothly_under_eviction(serve):
    trace = conversations()
    saved = [sum(serve(trace, size)) for size in (512, 256, 192, 128, 96, 64, 48)]
    lost = [(a - b) / saved[0] for a, b in pairwise(saved)]
    assert min(lost) >= 0
    assert 0 < max(lost) < 0.25


def test_steps_trace_under_shard_map():
    """With check_vma on, a cache and a table per device."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")

    def local(state):
        cache, table, tokens, new = jax.tree.map(lambda x: x[0], state)
        cache, table, done = pc.admit(cache, table, 0, tokens, L, 3)
        cache, table, ok, copies = pc.reserve(cache, table, new, max_new_pages=2)
        table, _ = pt.append(table, new)
        cache, table = pc.insert_rows(cache, table, new > 0, None, new)
        cache, table, freed = pc.evict(cache, table, 2)
        found = pc.match(cache, table, tokens, L)
        cache, table = pc.clear(cache, table)
        return jax.tree.map(lambda x: x[None], (cache, table, done, ok, copies, freed, found))

    host = Host()
    state = host.cache, host.table, np.zeros(L, np.int32), np.ones(R, np.int32)
    run = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)
    jax.eval_shape(run, jax.tree.map(lambda x: x[None], state))
