"""The work schedule: every block once, equal loads, static shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paxattn.attention import schedule as s

H, P, BLOCK = 2, 16, 64


@functools.partial(jax.jit, static_argnames=("heads", "cores", "max_pages", "split"))
def compute(q_lens, kv_lens, window, *, heads, cores, max_pages, split):
    return s.schedule_decode(
        q_lens, kv_lens, window, num_kv_heads=heads, page_size=P, max_pages_per_seq=max_pages,
        block_kv=BLOCK, num_cores=cores, split=split,
    )  # fmt: skip


def make(q_lens, kv_lens, window=0, *, heads=H, cores=8, max_pages=None, split=None):
    """The schedule, its live items, and the core of each."""
    q_lens, kv_lens = np.asarray(q_lens, np.int32), np.asarray(kv_lens, np.int32)
    max_pages = max_pages or max(-(-int(kv_lens.max(initial=1)) // P), 1)
    made = compute(
        q_lens, kv_lens, np.int32(window), heads=heads, cores=cores, max_pages=max_pages,
        split=split,
    )  # fmt: skip
    made = jax.tree.map(np.asarray, made)
    assert (np.diff(made.core_items) >= 0).all()
    assert made.core_items[0] == 0
    assert made.core_items[-1] <= len(made.items)
    core = np.repeat(np.arange(cores), np.diff(made.core_items))
    return made, made.items[: len(core)], core


def check(q_lens, kv_lens, window, split, heads, cores):
    made, items, core = make(q_lens, kv_lens, window, heads=heads, cores=cores, split=split)
    for row, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        seen_from = max(kv_len - q_len - window + 1, 0) if window > 0 else 0
        for head in range(heads):
            mine = items[(items[:, s.ROW] == row) & (items[:, s.HEAD] == head)]
            assert (mine[:, s.KV_LEN] == kv_len).all()
            assert (mine[:, s.Q_LEN] == q_len).all()
            if not (q_len and kv_len):
                assert len(mine) == 0  # zero-length rows make no items
                assert made.first_slots[row, head] == -1
                continue
            # The pieces follow each other, from the first page seen to the last token.
            at = seen_from // P * P
            for piece in mine:
                assert piece[s.TOKEN] == at
                at += piece[s.BLOCKS] * BLOCK
            assert at >= kv_len
            assert at - kv_len < BLOCK
            # One piece has no slot; the slots of several follow each other too.
            if len(mine) == 1:
                assert mine[0, s.SLOT] == made.first_slots[row, head] == -1
            else:
                first = made.first_slots[row, head]
                np.testing.assert_array_equal(mine[:, s.SLOT], first + np.arange(len(mine)))
                assert made.merge_counts[first] == len(mine)
            if split:
                assert (mine[:-1, s.BLOCKS] == split).all()
                assert 0 < mine[-1, s.BLOCKS] <= split
    partial = items[:, s.SLOT] >= 0
    assert made.merge_counts.sum() == partial.sum()
    assert len(set(items[partial, s.SLOT])) == partial.sum()
    cost = np.bincount(core, items[:, s.BLOCKS], minlength=cores) + np.bincount(
        core, minlength=cores
    )
    if split is None:
        # (A unit's overhead is in the buckets once, and here with each piece: two per core more.)
        assert cost.max() <= max(-(-sum(unit_costs(made, items)) // cores), 3) + 2
    else:
        assert cost.max() <= sum(cost) / cores + split + 2


def unit_costs(made, items):
    """Blocks and one for each (row, head)."""
    rows, heads = made.first_slots.shape
    blocks = np.zeros((rows, heads), int)
    np.add.at(blocks, (items[:, s.ROW], items[:, s.HEAD]), items[:, s.BLOCKS])
    return [n + 1 for n in blocks.ravel() if n]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_block_once_and_balanced(data):
    rows = 6  # (static shapes: one compilation for all)
    lens = st.one_of(st.integers(0, 70), st.integers(0, 3000))
    kv_lens = data.draw(st.lists(lens, min_size=rows, max_size=rows))
    kv_lens[0] = min(kv_lens[0], 2999)
    q_lens = [data.draw(st.integers(0, min(n, 9))) for n in kv_lens]
    window = data.draw(st.sampled_from([0, -3, 1, 16, 100]))
    split = data.draw(st.sampled_from([None, 2]))
    made_lens = [*kv_lens, 3000]
    check([*q_lens, 1], made_lens, window, split, H, 8)


PEERS = {
    "a million tokens": [2**20],
    "512 short": [100] * 512,
    "skewed": [131072] + [4096] * 31,
    "64x4k": [4096] * 64,
    "one token": [1],
    "nothing": [0, 0, 0],
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("split", [None, 64])
def test_batches_of_the_field(name, split):
    kv_lens, cores, heads = PEERS[name], 264, 8
    if split and name in ("512 short", "64x4k"):
        pytest.skip("slow to check in Python, and no different")
    made, items, core = make([1] * len(kv_lens), kv_lens, heads=heads, cores=cores, split=split)
    wanted = heads * sum(-(-n // BLOCK) for n in kv_lens)
    assert items[:, s.BLOCKS].sum() == wanted
    loads = np.bincount(core, items[:, s.BLOCKS], minlength=cores)
    if split is None:
        assert len(made.items) == len(kv_lens) * heads + cores
        assert len(made.merge_counts) == 2 * cores
        even = -(-(wanted + heads * len(kv_lens)) // cores)
        assert loads.max() <= max(even, 3)
    else:
        assert loads.max() <= wanted / cores + split + 1


@pytest.mark.parametrize("place", [0, 1, P - 1, P, P + 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_lengths_around_a_page_and_a_block(place):
    check([1, min(place, 2)], [place + 1, place], 0, None, H, 8)


def test_a_window_leaves_pages_out():
    _, items, _ = make([1, 2], [1000, 1000], 100)
    first = {row: items[items[:, s.ROW] == row][:, s.TOKEN].min() for row in (0, 1)}
    assert first == {0: (1000 - 1 - 100 + 1) // P * P, 1: (1000 - 2 - 100 + 1) // P * P}


def test_fixed_split_ignores_the_other_rows():
    """The pieces of a row, and their order, are the same whatever else is in the batch."""

    def pieces(kv_lens):
        _, items, _ = make([1, 1, 1], kv_lens, split=3, max_pages=200)
        mine = items[items[:, s.ROW] == 1]
        return mine[:, [s.HEAD, s.TOKEN, s.BLOCKS]]

    np.testing.assert_array_equal(pieces([5, 2000, 17]), pieces([3000, 2000, 0]))


def test_inside_jit_and_with_a_traced_window():
    lens = jnp.asarray([1000, 10], jnp.int32)

    @jax.jit
    def blocks(window):
        _, count = s.row_blocks(jnp.ones_like(lens), lens, window, page_size=P, block_kv=BLOCK)
        return count

    np.testing.assert_array_equal(blocks(jnp.int32(0)), [16, 1])
    np.testing.assert_array_equal(blocks(jnp.int32(100)), [2, 1])
