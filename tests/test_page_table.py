"""Every line of the allocator's contract, and how its steps compose with JAX's transformations."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from paxattn import page_table as pt
from paxattn.page_table import report

N, P, R, M = 10, 4, 4, 4  # the shapes that most tests share, so that steps compile once

STEPS = {
    name: jax.jit(getattr(pt, name))
    for name in ("append", "truncate", "discard", "release", "fork", "reorder", "adopt", "retain")
}
STEPS["drop"] = jax.jit(pt.drop)
STEPS["reserve"] = jax.jit(pt.reserve, static_argnames=("max_new_pages", "max_new_tokens"))
STEPS["slot_mapping"] = jax.jit(pt.slot_mapping, static_argnums=2)
STEPS["token_rows"] = jax.jit(pt.token_rows, static_argnums=1)
STEPS["utilization"] = jax.jit(pt.utilization)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def i32(values):
    return np.asarray(values, np.int32)


def mask(*rows, size=R):
    return np.isin(np.arange(size), rows)


def empty(**sizes):
    return pt.init_page_table(
        **({"num_pages": N, "page_size": P, "max_seqs": R, "max_pages_per_seq": M} | sizes)
    )


def grow(table, *tokens, bound=M):
    """Reserves and appends, which must succeed, and checks the table."""
    table, ok, copies = STEPS["reserve"](table, i32(tokens), max_new_pages=bound)
    assert np.asarray(ok).all()
    table, ok = STEPS["append"](table, i32(tokens))
    assert np.asarray(ok).all()
    pt.check_invariants(table)
    return table, copies


def filled(*tokens):
    return grow(empty(), *tokens)[0]


def held(table, row):
    """Pages of a row."""
    entries = np.asarray(table.block_tables)[row]
    return entries[entries < table.num_pages].tolist()


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_row_same(a, b, row):
    np.testing.assert_array_equal(a.block_tables[row], b.block_tables[row])
    assert a.kv_lens[row] == b.kv_lens[row]


# Making a table.


def test_fresh_table_is_empty_and_hands_out_pages_in_order():
    table = empty()
    pt.check_invariants(table)
    assert (table.num_pages, table.max_seqs, table.max_pages_per_seq) == (N, R, M)
    assert table.page_size == P
    assert int(table.num_free) == N
    assert all(x.dtype == jnp.int32 for x in jax.tree.leaves(table))
    table, _ = grow(table, 5, 4, 0, 1)
    assert [held(table, r) for r in range(R)] == [[0, 1], [2], [], [3]]


@pytest.mark.parametrize("name", ["num_pages", "page_size", "max_seqs", "max_pages_per_seq"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, None, "4"])
def test_init_refuses_what_is_no_positive_integer(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be an integer of at least 1"):
        empty(**{name: value})


def test_init_refuses_what_overflows():
    with pytest.raises(ValueError, match="page_size=257 must be between 1 and 256"):
        empty(page_size=257)
    with pytest.raises(ValueError, match=r"num_pages=134217728 times page_size=16.*at most"):
        empty(page_size=16, num_pages=2**27)
    with pytest.raises(ValueError, match=r"max_pages_per_seq=\d+ times page_size=256"):
        empty(page_size=256, max_pages_per_seq=np.int32(2**23))
    with pytest.raises(
        ValueError,
        match="max_seqs=65536 times max_pages_per_seq=32768 is 2147483648 block_tables entries, "
        "which are counted in int32: at most 2146435071; use max_seqs=65503 at most",
    ):
        empty(max_seqs=2**16, max_pages_per_seq=2**15)


def test_64_bit_numbers_do_not_wrap_round():
    """Their low 32 bits would be amounts, rows and pages that there are."""
    table, far = filled(6, 3, 0, 0), 2**32
    pages = held(table, 0)

    @jax.jit
    def steps(table):  # these numbers stay NumPy's, as they do outside of jit
        return [
            pt.reserve(table, np.full(R, far + 1))[:2],
            pt.reserve(table, np.full(R, -far + 1))[:2],
            pt.truncate(table, np.full(R, far, np.uint64)),
            pt.fork(table, np.array([far, 0]), np.array([3, far + 3])),
            pt.adopt(table, np.int64(far + 3), pages, 6),
        ]

    for after, ok in steps(table):
        assert not np.asarray(ok).any()
        assert_same(table, after)
    assert_same(table, pt.retain(table, np.array([far]), np.ones(1, bool)))
    with jax.enable_x64(True):
        ok = jax.jit(pt.reserve)(table, np.full(R, far + 1))[1]
    assert not np.asarray(ok).any()


def test_sizes_may_be_numpy_integers():
    assert empty(num_pages=np.int64(7)).num_pages == 7


# reserve, append.


@pytest.mark.parametrize("page_size", [1, 4, 256])
def test_lengths_around_the_page_size(page_size):
    lengths = [0, 1, page_size - 1, page_size, page_size + 1]
    table = empty(page_size=page_size, max_seqs=5)
    table, ok, _ = STEPS["reserve"](table, i32(lengths), max_new_pages=2)
    assert np.asarray(ok).all()
    table, ok = STEPS["append"](table, i32(lengths))
    assert np.asarray(ok).all()
    pt.check_invariants(table)
    assert table.kv_lens.tolist() == lengths
    assert [len(held(table, r)) for r in range(5)] == [-(-n // page_size) for n in lengths]


def test_reserve_is_idempotent():
    once, ok, _ = STEPS["reserve"](empty(), i32([5, 0, 8, 1]), max_new_pages=M)
    twice, again, copies = STEPS["reserve"](once, i32([5, 0, 8, 1]), max_new_pages=M)
    assert_same(once, twice)
    assert np.asarray(ok & again).all()
    assert int(copies.count) == 0
    pt.check_invariants(once)
    assert once.kv_lens.tolist() == [0] * R


def test_reserve_of_nothing_changes_nothing():
    table = filled(5, 0, 4, 16)
    after, ok, copies = STEPS["reserve"](table, i32([0] * R))
    assert_same(table, after)
    assert np.asarray(ok).all()
    assert int(copies.count) == 0
    assert (np.asarray(copies.src) == N).all()


def test_reserve_counts_missing_pages_only():
    """Spare pages count as held however many there are: only one page is missing here."""
    table = empty()
    for tokens in (4, 8, 12, 16):
        table, ok, _ = STEPS["reserve"](table, i32([tokens, 0, 0, 0]))
        assert np.asarray(ok).all()
        pt.check_invariants(table)
    assert len(held(table, 0)) == 4
    table, ok, _ = STEPS["reserve"](table, i32([0, 8, 0, 0]))
    assert np.asarray(ok).tolist() == [True, False, True, True]


def test_reserve_refuses_rows_one_by_one_without_taking_from_the_others():
    table = filled(0, 3, 0, 0)
    asked = [-1, 14, 2**31 - 1, 4]  # negative, beyond the row (17 of 16 tokens), overflow, fine
    after, ok, _ = STEPS["reserve"](table, i32(asked), max_new_pages=M)
    assert np.asarray(ok).tolist() == [False, False, False, True]
    pt.check_invariants(after)
    for row in range(3):
        assert_row_same(table, after, row)
    assert int(after.num_free) == int(table.num_free) - 1
    after, ok, _ = STEPS["reserve"](table, i32([9, 0, 8, 0]), max_new_pages=2)
    assert np.asarray(ok).tolist() == [False, True, True, True]  # 3 pages are over the bound


@pytest.mark.parametrize("limit", [1, 2, P, P + 1])
def test_a_bound_in_tokens_asks_for_the_same(limit):
    """At every offset in a page, with and without a page that others hold, and in a full pool."""
    outcomes = set()
    for length in range(2 * P + 1):
        for new in range(limit + 1):
            table = filled(length, 0, 0, 5)
            table, _ = STEPS["fork"](table, i32([0]), i32([1]))
            asked = i32([new, new, new, limit])
            by_tokens, ok, copies = STEPS["reserve"](table, asked, max_new_tokens=limit)
            by_pages, fine, same = STEPS["reserve"](table, asked, max_new_pages=-(-limit // P))
            assert_same(by_tokens, by_pages)
            assert np.asarray(ok).tolist() == np.asarray(fine).tolist()
            count = int(copies.count)
            assert count == int(same.count)
            assert np.asarray(copies.src)[:count].tolist() == np.asarray(same.src)[:count].tolist()
            assert np.asarray(copies.dst)[:count].tolist() == np.asarray(same.dst)[:count].tolist()
            outcomes |= {(bool(np.all(ok)), count > 0)}
    assert {(True, True), (True, False)} <= outcomes
    after, ok, _ = STEPS["reserve"](table, i32([0, limit + 1, 0, 0]), max_new_tokens=limit)
    assert np.asarray(ok).tolist() == [True, False, True, True]
    assert_same(table, after)


def test_out_of_pages_fails_in_row_order_and_loses_nothing():
    table = filled(16, 15, 4, 0)  # 9 of 10 pages
    before = table
    # Row 1 has room, row 2 needs the last page, row 3 does not fit any more.
    table, ok, _ = STEPS["reserve"](table, i32([0, 1, 1, 1]))
    assert np.asarray(ok).tolist() == [True, True, True, False]
    pt.check_invariants(table)
    assert_row_same(before, table, 3)
    assert int(table.num_free) == 0
    # Full: the first that does not fit fails, later rows that need pages too, others succeed.
    full = table
    table, ok, _ = STEPS["reserve"](full, i32([0, 1, 5, 1]))
    assert np.asarray(ok).tolist() == [True, True, False, False]
    assert_same(full, table)
    # Pages come back, and the same request succeeds.
    table = STEPS["release"](full, mask(0))
    table, ok, _ = STEPS["reserve"](table, i32([0, 1, 5, 1]))
    assert np.asarray(ok).all()
    pt.check_invariants(table)


def test_a_large_row_that_fails_keeps_later_rows_from_overtaking():
    table = filled(16, 16, 0, 0)  # 2 pages left
    after, ok, _ = STEPS["reserve"](table, i32([0, 0, 12, 4]), max_new_pages=M)
    assert np.asarray(ok).tolist() == [True, True, False, False]
    assert_same(table, after)


def test_full_table_has_room_for_no_one_and_releases_whole():
    table = filled(16, 12, 8, 4)  # every row and every page in use
    assert int(table.num_free) == 0
    after, ok, _ = STEPS["reserve"](table, i32([1] * R))
    assert not np.asarray(ok).any()
    assert_same(table, after)
    after, ok = STEPS["append"](table, i32([1] * R))
    assert not np.asarray(ok).any()
    assert_same(table, after)
    table = STEPS["release"](table, np.ones(R, bool))
    pt.check_invariants(table)
    assert int(table.num_free) == N


def test_append_stays_within_the_room():
    table, _, _ = STEPS["reserve"](empty(), i32([5, 4, 0, 1]), max_new_pages=M)
    table, ok = STEPS["append"](table, i32([8, 5, 1, -1]))
    assert np.asarray(ok).tolist() == [True, False, False, False]
    assert table.kv_lens.tolist() == [8, 0, 0, 0]
    table, ok = STEPS["append"](table, i32([0, 2**31 - 1, 0, 4]))
    assert np.asarray(ok).tolist() == [True, False, True, True]
    assert table.kv_lens.tolist() == [8, 0, 0, 4]


def test_append_refuses_a_page_that_others_hold():
    table, _ = STEPS["fork"](filled(5, 0, 0, 0), i32([0]), i32([1]))
    after, ok = STEPS["append"](table, i32([1, 1, 0, 0]))
    assert np.asarray(ok).tolist() == [False, False, True, True]
    assert_same(table, after)


# Copy-on-write.


def test_a_row_copies_a_shared_page_before_it_writes():
    table, ok = STEPS["fork"](filled(6, 0, 0, 0), i32([0]), i32([2]))
    assert np.asarray(ok).all()
    after, ok, copies = STEPS["reserve"](table, i32([0, 0, 1, 0]))
    pt.check_invariants(after)
    assert int(copies.count) == 1
    assert held(after, 0) == held(table, 0)
    assert held(after, 2)[0] == held(table, 0)[0]
    assert copies.src[0] == held(table, 0)[1]
    assert copies.dst[0] == held(after, 2)[1] != held(table, 0)[1]
    # Now everyone is alone with the page they write: nobody copies again.
    again, ok, copies = STEPS["reserve"](after, i32([1, 0, 1, 0]))
    assert np.asarray(ok).all()
    assert int(copies.count) == 0
    assert_same(after, again)


def test_full_shared_pages_are_not_copied():
    table, _ = STEPS["fork"](filled(8, 0, 0, 0), i32([0]), i32([1]))
    table, copies = grow(table, 1, 1, 0, 0, bound=1)
    assert int(copies.count) == 0
    assert np.asarray(table.ref_counts)[held(table, 0)].tolist() == [2, 2, 1]


def test_copy_and_new_page_in_one_step_and_copies_do_not_count_as_new():
    table, _ = STEPS["fork"](filled(6, 0, 0, 0), i32([0]), i32([1]))
    table, ok, copies = STEPS["reserve"](table, i32([0, 4, 0, 0]), max_new_pages=1)
    assert np.asarray(ok).all()
    assert int(copies.count) == 1
    assert len(held(table, 1)) == 3
    pt.check_invariants(table)


def test_page_left_by_all_its_holders_returns_but_not_in_the_same_step():
    """Both sharers copy; the old page goes back on the stack above the pages just taken."""
    table, _ = STEPS["fork"](filled(2, 0, 0, 0), i32([0]), i32([1]))
    (old,) = held(table, 0)
    table, ok, copies = STEPS["reserve"](table, i32([1, 1, 1, 1]))
    assert np.asarray(ok).all()
    pt.check_invariants(table)
    assert copies.src[:2].tolist() == [old, old]
    taken = [held(table, r)[0] for r in range(R)]
    assert old not in taken
    assert copies.dst[:2].tolist() == taken[:2]
    assert int(table.ref_counts[old]) == 0
    assert int(table.num_free) == N - R
    assert int(table.free_pages[table.num_free - 1]) == old


def test_copy_sources_do_not_serve_the_step_that_frees_them():
    """One page is left for two sharers: the first gets it, the second then writes alone."""
    table = filled(15, 16, 4, 0)
    table, _ = STEPS["fork"](table, i32([0]), i32([3]))
    before = table
    table, ok, copies = STEPS["reserve"](table, i32([1, 0, 0, 1]))
    assert np.asarray(ok).tolist() == [True, True, True, False]
    assert int(copies.count) == 1
    assert_row_same(before, table, 3)
    pt.check_invariants(table)
    table, ok, copies = STEPS["reserve"](table, i32([0, 0, 0, 1]))
    assert np.asarray(ok).all()
    assert int(copies.count) == 0


def test_copy_on_write_for_a_holder_that_is_no_row():
    table = filled(2, 0, 0, 0)
    page = held(table, 0)
    table = STEPS["retain"](table, i32([page[0], N]), np.array([True, True]))
    held_elsewhere = np.bincount(page, minlength=N)
    table, ok, copies = STEPS["reserve"](table, i32([1, 0, 0, 0]))
    assert (bool(ok[0]), int(copies.count)) == (True, 1)
    pt.check_invariants(table, held_elsewhere)
    table = STEPS["drop"](table, i32([page[0], N]), np.array([True, True]))
    pt.check_invariants(table)
    assert int(table.num_free) == N - 1


def test_copies_are_compacted():
    table, _ = STEPS["fork"](filled(0, 3, 0, 0), i32([1, 1]), i32([2, 3]))
    _, _, copies = STEPS["reserve"](table, i32([1, 0, 1, 1]))
    assert int(copies.count) == 2
    assert copies.src.shape == copies.dst.shape == (R * 2,)
    assert (np.asarray(copies.src)[:2] < N).all()
    assert (np.asarray(copies.src)[2:] == N).all()
    assert (np.asarray(copies.dst)[2:] == N).all()


# truncate, release.


def test_truncate_gives_back_pages_and_spare_ones():
    table = filled(9, 8, 5, 0)
    table, _, _ = STEPS["reserve"](table, i32([0, 0, 4, 0]))
    table, ok = STEPS["truncate"](table, i32([4, 9, 5, 0]))
    assert np.asarray(ok).tolist() == [True, False, True, True]
    assert table.kv_lens.tolist() == [4, 8, 5, 0]
    assert [len(held(table, r)) for r in range(R)] == [1, 2, 2, 0]
    pt.check_invariants(table)
    table, ok = STEPS["truncate"](table, i32([0, -1, -(2**31), 1]))
    assert np.asarray(ok).tolist() == [True, False, False, False]
    assert [len(held(table, r)) for r in range(R)] == [0, 2, 2, 0]
    pt.check_invariants(table)


def test_truncate_that_is_refused_keeps_spare_pages():
    table, _, _ = STEPS["reserve"](filled(4, 0, 0, 0), i32([8, 0, 0, 0]), max_new_pages=2)
    after, _ = STEPS["truncate"](table, i32([-1] * R))
    assert_same(table, after)


def test_truncate_of_a_fork_leaves_the_other_row():
    table, _ = STEPS["fork"](filled(9, 0, 0, 0), i32([0]), i32([1]))
    after, _ = STEPS["truncate"](table, i32([3, 9, 0, 0]))
    assert_row_same(table, after, 1)
    assert int(after.num_free) == int(table.num_free)
    pt.check_invariants(after)


@pytest.mark.parametrize(("start", "gone"), [(-9, 0), (3, 0), (4, 1), (11, 2), (12, 2), (99, 2)])
def test_discard_gives_back_whole_pages_but_never_the_last(start, gone):
    table = filled(12, 6, 0, 0)
    pages = held(table, 0)
    after = STEPS["discard"](table, i32([start, 0, start, 0]))
    pt.check_invariants(after)
    assert after.block_tables[0].tolist() == [N] * gone + pages[gone:] + [N]
    assert after.kv_lens.tolist() == [12, 6, 0, 0]
    assert int(after.num_free) == int(table.num_free) + gone
    assert_row_same(after, table, 1)
    used = STEPS["utilization"](after)
    assert (int(used.tokens_stored), int(used.tokens_shared)) == (18 - gone * P, 0)


def test_a_row_that_discarded_its_beginning_goes_on_as_before():
    table = STEPS["discard"](filled(12, 0, 0, 0), i32([8, 0, 0, 0]))
    # Its holds are only its own: forks of it have the same gap, and are not taken for empty.
    table, ok = STEPS["fork"](table, i32([0, 1]), i32([1, 0]))
    assert np.asarray(ok).tolist() == [True, False]
    table, ok = STEPS["adopt"](table, np.int32(1), i32([held(table, 0)[0]] * M), np.int32(3))
    assert not ok
    pt.check_invariants(table)
    assert int(table.num_free) == N - 1
    # Truncating it to what is no longer there is refused; within the rest it is not.
    for lens, fine in (([8, -1], False), ([9, -1], True), ([0, -1], True)):
        after, ok = STEPS["truncate"](table, i32([*lens, -1, -1]))
        assert bool(ok[0]) == fine
        assert after.kv_lens.tolist() == [lens[0] if fine else 12, 12, 0, 0]
        pt.check_invariants(after)
    table, _ = grow(table, 3, 1, 0, 0)
    assert [len(held(table, row)) for row in range(2)] == [2, 2]
    table = STEPS["reorder"](table, i32([0, 0, 0, 0]), mask(1, 2))
    pt.check_invariants(table)
    assert table.kv_lens.tolist() == [15, 15, 15, 0]
    table = STEPS["discard"](table, i32([99] * R))
    assert [held(table, row) for row in range(3)] == [held(table, 0)[-1:]] * 3
    table = STEPS["release"](table, mask(0, 1, 2, 3))
    pt.check_invariants(table)
    assert int(table.num_free) == N


def test_release_returns_pages_once_and_ignores_empty_rows():
    table, _ = STEPS["fork"](filled(6, 0, 5, 0), i32([0]), i32([1]))
    table = STEPS["release"](table, mask(0, 3))
    pt.check_invariants(table)
    assert int(table.num_free) == N - 4
    assert_same(table, STEPS["release"](table, mask(0, 3)))
    assert_same(table, STEPS["release"](table, mask()))
    table = STEPS["release"](table, mask(0, 1, 2, 3))
    pt.check_invariants(table)
    assert int(table.num_free) == N
    assert table.kv_lens.tolist() == [0] * R


def test_rows_that_share_pages_can_be_released_together():
    table, _ = STEPS["fork"](filled(6, 0, 0, 0), i32([0, 0, 0]), i32([1, 2, 3]))
    table = STEPS["release"](table, mask(0, 1, 2, 3))
    pt.check_invariants(table)
    assert int(table.num_free) == N


# fork, reorder.


def test_fork_shares_the_pages_with_tokens_and_no_spare_ones():
    table, _, _ = STEPS["reserve"](filled(5, 0, 0, 0), i32([8, 0, 0, 0]), max_new_pages=2)
    table, ok = STEPS["fork"](table, i32([0]), i32([3]))
    assert np.asarray(ok).all()
    pt.check_invariants(table)
    assert held(table, 3) == held(table, 0)[:2]
    assert len(held(table, 0)) == 4
    assert table.kv_lens.tolist() == [5, 0, 0, 5]


@pytest.mark.parametrize(
    ("src", "dst"),
    [(0, 0), (3, 3), (0, 1), (-1, 3), (0, -1), (R, 3), (0, R), (0, -(2**31)), (2**31 - 1, 3)],
)
def test_fork_that_cannot_be_done_changes_nothing(src, dst):
    """Onto itself, onto a row with pages, out of range (negative ones must not wrap round)."""
    table = filled(6, 3, 0, 0)
    after, ok = STEPS["fork"](table, i32([src]), i32([dst]))
    assert not bool(ok[0])
    assert_same(table, after)


def test_fork_onto_a_row_that_only_reserved_is_refused():
    table, _, _ = STEPS["reserve"](filled(6, 0, 0, 0), i32([0, 1, 0, 0]))
    after, ok = STEPS["fork"](table, i32([0]), i32([1]))
    assert not bool(ok[0])
    assert_same(table, after)


def test_fork_of_an_empty_row_is_fine_and_changes_nothing():
    table, _, _ = STEPS["reserve"](filled(6, 0, 0, 0), i32([0, 1, 0, 0]))
    after, ok = STEPS["fork"](table, i32([2, 1]), i32([3, 2]))  # empty; reserved only
    assert np.asarray(ok).all()
    assert_same(table, after)


def test_fork_with_the_same_destination_twice_serves_the_first_that_is_valid():
    table = filled(6, 3, 0, 0)
    after, ok = STEPS["fork"](table, i32([3, 1, 0]), i32([3, 3, 3]))
    assert np.asarray(ok).tolist() == [False, True, False]
    assert held(after, 3) == held(table, 1)
    pt.check_invariants(after)


def test_fork_reads_the_table_as_it_was_before():
    after, ok = STEPS["fork"](filled(6, 0, 0, 0), i32([0, 1, 0]), i32([1, 2, 3]))
    assert np.asarray(ok).all()
    assert after.kv_lens.tolist() == [6, 6, 0, 6]
    pt.check_invariants(after)


def test_reorder_moves_all_rows_at_once():
    table = filled(6, 3, 9, 0)
    after = STEPS["reorder"](table, i32([1, 0, 0, 3]), mask(0, 1, 2))
    pt.check_invariants(after)
    assert after.kv_lens.tolist() == [3, 6, 6, 0]
    assert held(after, 0) == held(table, 1)
    assert held(after, 1) == held(after, 2) == held(table, 0)
    assert int(after.num_free) == int(table.num_free) + 3  # what only row 2 held


def test_reorder_onto_itself_drops_spare_pages_only():
    table, _, _ = STEPS["reserve"](filled(5, 4, 0, 0), i32([8, 8, 0, 0]), max_new_pages=2)
    after = STEPS["reorder"](table, i32([0, 1, 2, 3]), mask(0))
    pt.check_invariants(after)
    assert held(after, 0) == held(table, 0)[:2]
    assert_row_same(table, after, 1)


def test_reorder_leaves_rows_outside_the_mask_or_with_bad_parents():
    table = filled(6, 3, 0, 0)
    after = STEPS["reorder"](table, i32([-1, R, 0, 0]), mask(0, 1, 2))
    for row in (0, 1, 3):
        assert_row_same(table, after, row)
    assert held(after, 2) == held(table, 0)
    pt.check_invariants(after)
    assert_same(table, STEPS["reorder"](table, i32([1, 0, 0, 0]), mask()))


def test_reorder_to_an_empty_parent_empties_the_row():
    after = STEPS["reorder"](filled(6, 3, 0, 0), i32([3, 0, 0, 0]), mask(0))
    assert held(after, 0) == []
    assert int(after.num_free) == N - 1
    pt.check_invariants(after)


# adopt, retain, drop.


def cached(table, row, tokens):
    """Pages of a row as a prefix cache would keep them: held once more, then the row goes."""
    pages = (held(table, row) + [N] * M)[:M]
    table = STEPS["retain"](table, i32(pages), np.array(pages) < N)
    return STEPS["release"](table, mask(row)), pages


def test_adopt_starts_a_row_on_held_pages():
    table, pages = cached(filled(8, 0, 0, 0), 0, 8)
    elsewhere = np.bincount(pages, minlength=N + 1)[:N]
    pt.check_invariants(table, elsewhere)
    table, ok = STEPS["adopt"](table, np.int32(2), i32(pages), np.int32(7))
    assert bool(ok)
    pt.check_invariants(table, elsewhere)
    assert held(table, 2) == pages[:2]
    assert table.kv_lens.tolist() == [0, 0, 7, 0]
    table, ok, copies = STEPS["reserve"](table, i32([0, 0, 1, 0]))
    assert int(copies.count) == 1  # the cache holds that page
    pt.check_invariants(table, elsewhere)


@pytest.mark.parametrize(
    ("row", "change", "num_tokens"),
    [
        (1, {}, 4),  # holds pages
        (-1, {}, 4),
        (R, {}, 4),
        (2, {}, -1),
        (2, {}, M * P + 1),
        (2, {}, 2**31 - 1),
        (2, {}, 9),  # a third page, which is the sentinel
        (2, {1: -1}, 8),
        (2, {0: 9}, 8),  # free
        (2, {1: 2**31 - 1}, 8),
    ],
)
def test_adopt_that_cannot_be_done_changes_nothing(row, change, num_tokens):
    table, pages = cached(filled(8, 3, 0, 0), 0, 8)
    for i, page in change.items():
        pages[i] = page
    after, ok = STEPS["adopt"](table, np.int32(row), i32(pages), np.int32(num_tokens))
    assert not bool(ok)
    assert_same(table, after)


def test_adopt_of_no_tokens_and_of_fewer_pages_than_the_row_is_wide():
    table, pages = cached(filled(8, 0, 0, 0), 0, 8)
    after, ok = STEPS["adopt"](table, 3, pages, 0)
    assert bool(ok)
    assert_same(table, after)
    after, ok = STEPS["adopt"](table, 3, pages[:2], 8)
    assert bool(ok)
    assert held(after, 3) == pages[:2]
    with pytest.raises(ValueError, match=r"pages has 5 entries.*table.max_pages_per_seq=4"):
        STEPS["adopt"](table, 3, [N] * 5, 0)


def test_drop_of_the_same_page_twice_frees_it_once():
    table, pages = cached(filled(4, 0, 0, 0), 0, 4)
    page = pages[0]
    after = STEPS["drop"](table, i32([page] * M), np.ones(M, bool))  # held once, given up 4 times
    pt.check_invariants(after)
    assert int(after.num_free) == N
    again = STEPS["drop"](after, i32([page] * M), np.ones(M, bool))
    assert_same(after, again)


def test_duplicates_count_as_separate_holds():
    table = filled(4, 0, 0, 0)
    (page,) = held(table, 0)
    table = STEPS["retain"](table, i32([page] * M), np.ones(M, bool))
    assert int(table.ref_counts[page]) == 1 + M
    table = STEPS["drop"](table, i32([page] * M), mask(0, 2, 3))
    assert int(table.ref_counts[page]) == 2
    table = STEPS["release"](table, mask(0))
    table = STEPS["drop"](table, i32([page] * M), mask(1))
    pt.check_invariants(table)


def test_retain_and_drop_ignore_free_and_out_of_range_pages():
    table = filled(4, 0, 0, 0)
    pages = i32([-1, N, 2**31 - 1, 9])
    assert_same(table, STEPS["retain"](table, pages, np.ones(M, bool)))
    assert_same(table, STEPS["drop"](table, pages, np.ones(M, bool)))
    assert_same(table, STEPS["drop"](table, i32([0] * M), np.zeros(M, bool)))
    assert_same(table, STEPS["drop"](table, i32([]), np.zeros(0, bool)))
    assert_same(table, STEPS["fork"](table, i32([]), i32([]))[0])


# Slots.


def test_slots_follow_the_block_table():
    table, _, _ = STEPS["reserve"](filled(3, 0, 8, 0), i32([3, 1, 1, 0]), max_new_pages=M)
    slots = STEPS["slot_mapping"](table, i32([3, 1, 1, 0]), 8)
    a, b, c = held(table, 0), held(table, 1), held(table, 2)
    wanted = [a[0] * P + 3, a[1] * P, a[1] * P + 1, b[0] * P, c[2] * P]
    assert slots.tolist() == [*wanted, N * P + 5, N * P + 6, N * P + 7]
    assert slots.dtype == jnp.int32


def test_tokens_that_must_not_be_written_get_distinct_out_of_range_slots():
    """Empty rows never reach page 0, nor anyone a missing page or one that others hold."""
    table, _ = STEPS["fork"](filled(3, 4, 0, 0), i32([0]), i32([2]))
    slots = np.asarray(STEPS["slot_mapping"](table, i32([1, 1, 1, 1]), 8))
    assert slots.tolist() == [N * P + t for t in range(8)]
    # Row 3 (reserved) is served between rows that are not.
    table, _, _ = STEPS["reserve"](table, i32([0, 0, 0, 1]))
    slots = np.asarray(STEPS["slot_mapping"](table, i32([1, 1, 1, 6]), 8))
    first = held(table, 3)[0] * P
    assert slots.tolist() == [40, 41, 42, first, first + 1, first + 2, first + 3, 47]


def test_slots_stay_within_a_row():
    """Past the last entry of a full row lies the next row's first page."""
    table = filled(M * P, 4, 0, 0)
    slots = STEPS["slot_mapping"](table, i32([2, 0, 0, 0]), 8)
    assert (np.asarray(slots) >= N * P).all()
    _, ok, _ = STEPS["reserve"](table, i32([1, 0, 0, 0]))
    assert not bool(ok[0])


@pytest.mark.parametrize(
    "q_lens", [[1, 1, 1, 1], [0, 3, 0, 2], [0] * 4, [-5, 2, 0, 1], [9, 1, 0, 0]]
)
def test_token_rows(q_lens):
    rows, offsets, active = STEPS["token_rows"](i32(q_lens), 8)
    wanted = [(r, i) for r, n in enumerate(q_lens) for i in range(n)][:8]
    wanted += [(R, 0)] * (8 - len(wanted))
    assert list(zip(rows.tolist(), offsets.tolist(), strict=True)) == wanted
    assert active.tolist() == [r < R for r, _ in wanted]


def test_token_rows_does_not_overflow():
    rows, _, active = STEPS["token_rows"](i32([2**31 - 1] * R), 8)
    assert rows.tolist() == [0] * 8
    assert np.asarray(active).all()
    rows, offsets, active = STEPS["token_rows"](i32([2**31 - 1] * 2**16), 2**15 + 2)
    assert not np.asarray(rows).any()
    assert np.asarray(active).all()
    assert offsets[-1] == 2**15 + 1


def test_large_pool_does_not_overflow():
    """40,000 pages of 256: slots beyond 10 million, all rows filled to the last page."""
    num_pages, page_size = 40_000, 256
    table = empty(num_pages=num_pages, page_size=page_size, max_pages_per_seq=num_pages // R)
    tokens = i32([num_pages // R * page_size] * R)
    table, ok, _ = STEPS["reserve"](table, tokens, max_new_pages=num_pages)
    assert np.asarray(ok).all()
    table, ok = STEPS["append"](table, tokens - 1)
    assert np.asarray(ok).all()
    pt.check_invariants(table)
    last = np.asarray(table.block_tables)[:, -1]
    assert last.max() == num_pages - 1
    slots = STEPS["slot_mapping"](table, i32([1] * R), R)
    assert slots.tolist() == (last * page_size + page_size - 1).tolist()
    pt.check_invariants(STEPS["release"](table, np.ones(R, bool)))


def test_pool_smaller_than_the_window():
    table, ok, _ = STEPS["reserve"](empty(num_pages=1), i32([1, 1, 0, 4]))
    assert np.asarray(ok).tolist() == [True, False, True, False]
    pt.check_invariants(table)


# Counting.


def test_utilization_counts_shared_tokens_once():
    table, _ = STEPS["fork"](filled(6, 3, 0, 0), i32([0, 0]), i32([2, 3]))
    table, _ = STEPS["truncate"](table, i32([6, 3, 5, 4]))
    used = STEPS["utilization"](table)
    assert (int(used.num_pages), int(used.pages_held), int(used.pages_in_rows)) == (N, 3, 3)
    assert (int(used.tokens_stored), int(used.tokens_shared)) == (18, 9)
    assert float(used.fraction) == pytest.approx(9 / 12)
    assert float(STEPS["utilization"](empty()).fraction) == 1


def broken(table, **arrays):
    return dataclasses.replace(table, **{k: jnp.asarray(v, jnp.int32) for k, v in arrays.items()})


def test_utilization_of_more_tokens_than_an_int32_counts():
    """Only rows by the thousand, with a million shared tokens each, get there."""
    for tokens, total in (([2**30, 2**30 - 1], 2**31 - 1), ([2**30] * 3, 2**31 - 1), ([3, 4], 7)):
        assert report._sum_up_to_int32(jnp.array([tokens, [0] * len(tokens)], jnp.int32)) == total


def test_check_invariants_names_what_is_wrong():
    table = filled(6, 3, 0, 0)
    blocks, refs = np.array(table.block_tables), np.array(table.ref_counts)
    stack = np.array(table.free_pages)
    gap = np.where(np.arange(R * M).reshape(R, M) == 2 * M + 1, 0, blocks)
    between = np.where(np.arange(M) == 1, N, np.arange(R * M).reshape(R, M) % N)
    twice = np.where(np.arange(N) == 0, stack[1], stack)
    cases = [
        ({"block_tables": np.where(blocks == N, -1, blocks)}, "block_tables entries outside"),
        ({"block_tables": gap}, "pages after an unused entry"),
        ({"block_tables": between, "kv_lens": [9] * R}, "entries of block_tables between pages"),
        ({"kv_lens": [6, 5, 0, 0]}, "kv_lens beyond the pages held: 1 wrong"),
        ({"kv_lens": [6, 99, 0, 0]}, "kv_lens beyond the pages held: 1 wrong"),
        ({"kv_lens": [-1, 3, 0, 0]}, "negative kv_lens"),
        ({"ref_counts": refs + 1}, "ref_counts differ from the holders of 10 pages"),
        ({"num_free": N + 1}, "num_free=11"),
        ({"num_free": N - 4}, "pages neither free nor held: 1 wrong"),
        ({"num_free": N - 2}, "pages both free and held: 1 wrong"),
        ({"free_pages": twice}, "more than once"),
        ({"free_pages": stack - 10}, "free_pages entries outside"),
        ({"free_pages": stack[:-1]}, r"free_pages has shape \(9,\)"),
    ]
    for change, message in cases:
        with pytest.raises(pt.InvariantError, match=message):
            pt.check_invariants(broken(table, **change))
    with pytest.raises(pt.InvariantError, match="counted 1, held 2 times"):
        pt.check_invariants(table, np.arange(N) == 0)
    with pytest.raises(pt.InvariantError, match="held_elsewhere has shape"):
        pt.check_invariants(table, np.zeros(3))
    with pytest.raises(pt.InvariantError, match="expected"):
        pt.check_invariants(jax.tree.map(lambda x: x[None], table))


# Bad arguments, seen while tracing.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: pt.reserve(t, i32([1])), r"new_tokens has shape \(1,\), expected shape \(4,\)"),
        (lambda t: pt.reserve(t, np.ones(R, np.float32)), "new_tokens must be integers"),
        (lambda t: pt.reserve(t, i32([1] * R), max_new_pages=0), "max_new_pages=0 must be"),
        (lambda t: pt.reserve(t, i32([1] * R), max_new_tokens=0), "max_new_tokens=0 must be"),
        (lambda t: pt.append(t, 1), r"n has shape \(\)"),
        (lambda t: pt.truncate(t, i32([[1] * R])), "new_lens has shape"),
        (lambda t: pt.release(t, i32([1] * R)), "mask must be booleans, got int32"),
        (lambda t: pt.release(t, np.ones(3, bool)), r"mask has shape \(3,\)"),
        (lambda t: pt.fork(t, i32([0, 1]), i32([2])), r"dst has shape \(1,\)"),
        (lambda t: pt.fork(t, np.int32(0), np.int32(1)), "src has shape .*expected one axis"),
        (lambda t: pt.reorder(t, i32([0]), np.ones(R, bool)), "parents has shape"),
        (lambda t: pt.adopt(t, i32([0]), i32([0]), 1), "row has shape"),
        (lambda t: pt.retain(t, i32([0]), np.ones(2, bool)), r"mask has shape \(2,\)"),
        (lambda t: pt.slot_mapping(t, i32([1]), 4), "q_lens has shape"),
        (lambda t: pt.slot_mapping(t, i32([1] * R), 2**31), "overflows int32 slots"),
        (lambda t: pt.slot_mapping(t, i32([1] * R), 0), "num_tokens=0 must be an integer of at l"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(empty())


# Composition.


def busy_step(table, i):
    """Every step once, driven by a counter: the same work for all transformations."""
    rows = jnp.arange(R, dtype=jnp.int32)
    wants = (rows + i) % 3
    table, ok, copies = pt.reserve(table, wants)
    slots = pt.slot_mapping(table, wants, 2 * R)
    table, _ = pt.append(table, jnp.where(ok, wants, 0))
    table, forked = pt.fork(table, i % R + rows[:2], (i + 1) % R + rows[:2])
    table = pt.reorder(table, (rows + i) % R, rows == i % 5)
    table, _ = pt.truncate(table, jnp.where(i % 3 == 0, 5, -1) * jnp.ones_like(rows))
    table = pt.retain(table, table.block_tables[0], rows < 1)
    table = pt.drop(table, table.block_tables[0], rows < 1)
    table, _ = pt.adopt(table, i % R, table.block_tables[1], table.kv_lens[1])
    table = pt.discard(table, jnp.where(rows == i % 4, i - rows, 0))
    table = pt.release(table, (rows == i % 7) & (i % 2 == 0))
    seen = jnp.sum(ok, dtype=jnp.int32) + copies.count + jnp.sum(forked, dtype=jnp.int32)
    return table, seen + jnp.sum(slots, dtype=jnp.int32)


COUNT = 12
TIMES = np.arange(COUNT, dtype=np.int32)


def noted_step(table, i):
    after, seen = busy_step(table, i)
    return after, (table, seen)


def at(tables, i):
    return jax.tree.map(lambda x: x[i], tables)


@pytest.fixture(scope="module")
def history():
    """All states of a run under scan, with the table donated, and what each step saw."""
    start = empty()
    with jax.numpy_dtype_promotion("strict"):
        run = jax.jit(lambda t: lax.scan(noted_step, t, TIMES), donate_argnums=0)
        last, (tables, seen) = run(start)
    assert start.ref_counts.is_deleted()
    # As NumPy arrays: every slice of a JAX array would compile.
    tables = jax.tree.map(lambda x, y: np.stack([*x, y]), *jax.device_get((tables, last)))
    return tables, np.asarray(seen)


def test_steps_run_under_scan_with_donation(history):
    tables, seen = history
    for i in range(COUNT + 1):
        pt.check_invariants(at(tables, i))
    assert len(set(tables.num_free.tolist())) > 3
    assert len(set(seen.tolist())) > 3


def test_steps_run_under_while_loop():
    """Rows grow until the pool is full."""

    def body(carry):
        table, _ = carry
        one = jnp.ones((R,), jnp.int32)
        table, ok, _ = pt.reserve(table, one)
        table, _ = pt.append(table, jnp.where(ok, one, 0))
        return table, jnp.any(ok)

    run = jax.jit(
        lambda t: lax.while_loop(lambda carry: carry[1], body, (t, jnp.bool_(True))),
        donate_argnums=0,
    )
    table, _ = run(empty())
    pt.check_invariants(table)
    assert int(table.num_free) == 0
    assert table.kv_lens.tolist() == [12, 12, 8, 8]  # 10 pages of 4, in row order


def test_steps_run_under_vmap(history):
    """All tables of the history, batched, take the steps they took one by one."""
    tables, seen = history
    out = jax.jit(jax.vmap(busy_step))(at(tables, slice(0, -1)), TIMES)
    assert_same(out, (at(tables, slice(1, None)), seen))


@pytest.mark.parametrize("stacked", [False, True])
def test_steps_run_under_shard_map(history, stacked):
    """With check_vma on: one table on every device, and a table per device."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("x") if stacked else PartitionSpec()

    def local(table):
        table = jax.tree.map(lambda x: x[0], table) if stacked else table
        out = lax.scan(busy_step, table, TIMES)
        return jax.tree.map(lambda x: x[None], out) if stacked else out

    run = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)
    start = empty()
    if stacked:
        start = jax.tree.map(lambda x: np.stack([x] * devices), start)
    out = jax.jit(run)(start)
    wanted = (at(history[0], -1), history[1])
    if stacked:
        wanted = jax.tree.map(lambda x: np.stack([x] * devices), wanted)
    assert_same(out, wanted)


def test_requests_may_differ_by_device_under_shard_map():
    """A table per device with amounts that vary, and amounts that are the same everywhere."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("x")

    def local(tables, amounts, same):
        table = jax.tree.map(lambda x: x[0], tables)
        table, ok, _ = pt.reserve(table, amounts[0], max_new_pages=M)
        table, ok2 = pt.append(table, same)
        table = pt.release(table, same > 1)
        return jax.tree.map(lambda x: x[None], (table, ok & ok2))

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec, check_vma=True
    )
    tables = jax.tree.map(lambda x: np.stack([x] * devices), empty())
    amounts = jnp.asarray([[1 + d % 3, 2, 2, 1] for d in range(devices)], jnp.int32)
    tables, ok = jax.jit(run)(tables, amounts, i32([1, 2, 0, 0]))
    assert np.asarray(ok).all()
    tables = jax.device_get(tables)
    for d in range(devices):
        table = at(tables, d)
        pt.check_invariants(table)
        assert table.kv_lens.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "step",
    [
        pt.append,
        pt.truncate,
        lambda table, x: pt.release(table, x > 0),
        lambda table, x: pt.fork(table, x, x + 1),
        lambda table, x: pt.reorder(table, x, x > 0),
        lambda table, x: pt.adopt(table, x[0], x, x[1]),
        lambda table, x: pt.retain(table, x, x > 0),
        lambda table, x: pt.drop(table, x, x > 0),
    ],
    ids=["append", "truncate", "release", "fork", "reorder", "adopt", "retain", "drop"],
)
def test_a_table_made_inside_shard_map_takes_requests_that_differ(step):
    """It is the same on every device until then. Types are settled while tracing."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x):
        return jax.tree.map(lambda leaf: leaf[None], step(empty(), x[0]))

    run = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    assert jax.eval_shape(run, jax.ShapeDtypeStruct((1, R), jnp.int32))


def test_table_is_a_pytree_with_a_static_page_size():
    table = empty()
    leaves, tree = jax.tree.flatten(table)
    assert len(leaves) == 5
    assert jax.tree.unflatten(tree, leaves).page_size == P
    assert (
        jax.eval_shape(
            partial(pt.init_page_table, num_pages=N, page_size=P, max_seqs=R, max_pages_per_seq=M)
        ).num_free.shape
        == ()
    )
    tables = jax.vmap(lambda _: empty())(jnp.arange(3))
    assert (tables.num_pages, tables.max_seqs, tables.max_pages_per_seq) == (N, R, M)


def decode(_, table):
    table, ok, _ = pt.reserve(table, jnp.ones((R,), jnp.int32), max_new_tokens=1)
    return pt.append(table, ok.astype(jnp.int32))[0]


def every_step(_, table):
    none = jnp.minimum(table.num_free, 0) + jnp.zeros((R,), jnp.int32)  # 0, but unknown to XLA
    table, ok, _ = pt.reserve(table, none)
    table, fine = pt.append(table, none)
    table = pt.retain(table, none, none > 0)
    table = pt.drop(table, none, ok & fine)
    table, _ = pt.append(table, none)
    table = pt.release(table, none > 0)
    table, _ = pt.truncate(table, none - 1)
    table = pt.discard(table, none)
    table, _ = pt.fork(table, none - 1, none)
    table, _ = pt.adopt(table, none[0], none, none[0] - 1)
    return pt.reorder(table, none, none > 0)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what XLA's CPU back end made")
@pytest.mark.parametrize("times", [8, None], ids=["static", "data"])
@pytest.mark.parametrize("step", [decode, every_step])
def test_no_step_copies_the_pool(step, times):
    """In a loop that carries a donated table, nothing as large as the pool or the rows is copied.

    XLA copies an array when it cannot prove that all reads of it come before a write; how often
    the loop turns may be known to it or not.
    """
    pages = 2**20
    table = jax.eval_shape(lambda: empty(num_pages=pages, max_pages_per_seq=64))

    def loop(table, bound):
        return lax.fori_loop(0, bound if times is None else times, step, table)

    program = jax.jit(loop, donate_argnums=0).lower(table, np.int32(8)).compile().as_text()
    assert "while(" in program
    copies = [x for x in program.splitlines() if " copy(" in x and x.split()[2].startswith("s32[")]
    large = [x for x in copies if f"s32[{pages}]" in x or f"s32[{R},64]" in x]
    assert not large


def test_python_integers_beyond_32_bits_are_named():
    """Lists and numbers, not arrays: refused rather than cut."""
    table = empty()
    for call in (
        lambda: pt.reserve(table, [2**32 + 1] * R),
        lambda: pt.truncate(table, [2**70] * R),
        lambda: pt.adopt(table, 2**32, i32([0]), 0),
    ):
        with pytest.raises(ValueError, match=r"must be integers \(of 32 bits\), got .*[0-9]"):
            call()
