"""The planner against what is really allocated, and the promise in numbers on the allocator."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from paxattn import kv_cache, memory
from paxattn import page_table as pt

SEVEN_B = {"num_layers": 32, "num_kv_heads": 32, "head_dim": 128, "dtype": jnp.float16}
GB = 2**30
MB = 2**20


def allocated(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def real_sizes(plan, **shape):
    """What the cache and the table of a plan take, without allocating them."""
    cache = jax.eval_shape(
        partial(kv_cache.init_kv_cache, num_pages=plan.num_pages, page_size=plan.page_size, **shape)
    )
    table = jax.eval_shape(
        partial(
            pt.init_page_table,
            num_pages=plan.num_pages,
            page_size=plan.page_size,
            max_seqs=plan.sequences_paged,
            max_pages_per_seq=plan.max_pages_per_seq,
        )
    )
    return cache, allocated(cache), allocated(table)


@pytest.mark.parametrize("page_size", [1, 16, 256])
@pytest.mark.parametrize("shared_prefix", [0, 200])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_plan_agrees_with_what_is_allocated_and_fits(page_size, shared_prefix, dtype):
    shape = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": dtype}
    asked = {"max_len": 2048, "mean_len": 500, "page_size": page_size, **shape}
    plan = memory.plan(
        memory_bytes=300 * MB, weight_bytes=50 * MB, shared_prefix=shared_prefix, **asked
    )
    cache, cache_bytes, table_bytes = real_sizes(plan, **shape)
    assert cache_bytes == plan.cache_bytes
    assert table_bytes == plan.table_bytes
    assert cache.bytes_per_token == plan.bytes_per_token
    assert cache.bytes_per_page == plan.bytes_per_page
    assert 0 <= plan.free_bytes < plan.bytes_per_page + 8
    used = plan.shared_pages + plan.sequences_paged * plan.pages_per_seq
    assert used <= plan.num_pages
    # One more sequence does not fit.
    more = used + plan.pages_per_seq
    sizes = {"max_seqs": plan.sequences_paged + 1, "max_pages_per_seq": plan.max_pages_per_seq}
    total = more * plan.bytes_per_page + memory.table_bytes(num_pages=more, **sizes)
    assert total > 250 * MB
    assert plan.sequences_naive == 250 * MB // (2048 * plan.bytes_per_token)


def test_plan_of_a_seven_billion_model_on_a_card_of_80_gb():
    plan = memory.plan(
        memory_bytes=80 * GB, weight_bytes=14 * GB, max_len=2048, mean_len=500, **SEVEN_B
    )
    assert plan.bytes_per_token == MB // 2
    assert plan.sequences_naive == 66  # of 1,024 MB each
    assert plan.sequences_paged == 263  # of 32 pages of 8 MB and a table row each
    assert plan.utilization_naive == pytest.approx(0.244, abs=5e-4)
    assert plan.utilization_paged == 500 / 512


def test_plan_counts_a_shared_prefix_once():
    plan = memory.plan(memory_bytes=GB, max_len=2048, mean_len=208, shared_prefix=200, **SEVEN_B)
    assert (plan.shared_pages, plan.pages_per_seq) == (12, 1)
    assert plan.sequences_paged == (GB // (8 * MB)) - 12 - 1  # the table takes the last page
    assert plan.sequences_naive == 1
    whole = memory.plan(memory_bytes=GB, max_len=16, mean_len=16, shared_prefix=16, **SEVEN_B)
    assert (whole.shared_pages, whole.pages_per_seq) == (1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bytes": 0}, "memory_bytes=0 must be an integer of at least 1"),
        ({"memory_bytes": 1.5}, r"memory_bytes=1\.5 must be an integer"),
        ({"weight_bytes": -1}, "weight_bytes=-1 must be"),
        ({"weight_bytes": GB}, "weight_bytes=1073741824 leaves nothing"),
        ({"num_layers": 0}, "num_layers=0 must be"),
        ({"num_kv_heads": True}, "num_kv_heads=True must be"),
        ({"head_dim": -1}, "head_dim=-1 must be"),
        ({"dtype": "int32"}, "dtype=int32 must be float32, bfloat16, float16"),
        ({"page_size": 257}, "page_size=257 must be between 1 and 256"),
        ({"page_size": 0}, "page_size=0 must be"),
        ({"mean_len": 3000}, "mean_len=3000 is above max_len=2048"),
        ({"shared_prefix": 501}, "shared_prefix=501 is above mean_len=500"),
        ({"memory_bytes": 100 * MB}, "one sequence of mean_len=500 tokens needs 268.* free"),
        ({"max_len": 2**32, "memory_bytes": 2**60}, "overflow the int32 slots"),
    ],
)
def test_bad_plans_are_named(change, message):
    asked = {"memory_bytes": GB, "max_len": 2048, "mean_len": 500, **SEVEN_B}
    with pytest.raises(ValueError, match=message):
        memory.plan(**(asked | change))


def test_plan_never_asks_for_more_pages_than_slots_can_number():
    plan = memory.plan(
        memory_bytes=2**50, num_layers=1, num_kv_heads=1, head_dim=1, max_len=64, mean_len=64
    )
    assert plan.num_pages * 16 < 2**31
    assert plan.sequences_paged * plan.pages_per_seq <= plan.num_pages


# The promise, measured on the allocator rather than by formula.

MAX_LEN, PAGE_SIZE = 2048, 16


def lengths(rng, shape):
    """Geometric lengths from 1 to 2,048 (many short, few long) with mean 500."""
    values = np.arange(1, MAX_LEN + 1)

    def weights(decay):
        w = np.exp(-decay * values)
        return w / w.sum()

    low, high = 0.0, 1.0
    for _ in range(60):
        decay = (low + high) / 2
        low, high = (decay, high) if weights(decay) @ values > 500 else (low, decay)
    return rng.choice(values, size=shape, p=weights(low)).astype(np.int32)


@jax.jit
def measure(table, draws):
    """Fills the table with each draw of lengths in turn; counts, and releases it again."""

    def one(table, lens):
        table, ok, _ = pt.reserve(table, lens, max_new_pages=table.max_pages_per_seq)
        table, fine = pt.append(table, lens)
        used = pt.utilization(table)
        table = pt.release(table, lens > 0)
        return table, (used, jnp.all(ok & fine), table.num_free)

    return lax.scan(one, table, draws)


def test_pages_use_what_they_hold_where_reservations_use_a_quarter():
    rng = np.random.default_rng(0)
    for rows, draws_of in ((10, {10: 240}), (200, {50: 48, 100: 24, 200: 12})):
        width = MAX_LEN // PAGE_SIZE
        table = pt.init_page_table(
            num_pages=rows * width, page_size=PAGE_SIZE, max_seqs=rows, max_pages_per_seq=width
        )
        requests = np.repeat(list(draws_of), list(draws_of.values()))
        draws = lengths(rng, (len(requests), rows))
        draws = np.where(np.arange(rows) < requests[:, None], draws, 0)
        _, (used, ok, num_free) = jax.device_get(measure(table, draws))
        assert ok.all()
        assert (num_free == rows * width).all()
        assert (used.tokens_stored == draws.sum(axis=1)).all()
        assert (used.tokens_shared == 0).all()
        for n in draws_of:
            mine = requests == n
            stored = used.tokens_stored[mine].mean()
            naive = stored / (n * MAX_LEN)
            paged = stored / used.slots_in_rows[mine].mean()
            assert naive == pytest.approx(0.244, abs=0.01)
            assert paged >= 0.984, (n, paged)
    # A hundred requests that reserve what they might need waste about 75 GB.
    wasted = (100 * MAX_LEN - used.tokens_stored[requests == 100]).mean() * MB // 2
    assert wasted / GB == pytest.approx(75, abs=2)


def test_a_prompt_of_200_tokens_shared_by_10_requests():
    token = jax.eval_shape(
        partial(kv_cache.init_kv_cache, num_pages=130, page_size=PAGE_SIZE, **SEVEN_B)
    ).bytes_per_token
    assert token == MB // 2
    table = pt.init_page_table(
        num_pages=130, page_size=PAGE_SIZE, max_seqs=10, max_pages_per_seq=16
    )
    first = np.arange(10) == 0
    prompt = np.where(first, 200, 0).astype(np.int32)
    table, _, _ = jax.jit(partial(pt.reserve, max_new_pages=13))(table, prompt)
    table, _ = jax.jit(pt.append)(table, prompt)
    table, ok = jax.jit(pt.fork)(table, np.zeros(9, np.int32), np.arange(1, 10, dtype=np.int32))
    assert np.asarray(ok).all()

    count = jax.jit(pt.utilization)

    def saved(table):
        return (10 * 13 - int(count(table).pages_held)) * PAGE_SIZE * token

    assert saved(table) == 936 * MB
    assert int(count(table).tokens_shared) == 9 * 200
    # Each request writes its own next token: the partly filled 13th page is copied.
    one = np.ones(10, np.int32)
    table, ok, copies = jax.jit(pt.reserve)(table, one)
    assert np.asarray(ok).all()
    assert int(copies.count) == 10
    table, _ = jax.jit(pt.append)(table, one)
    assert saved(table) == 864 * MB
    pt.check_invariants(table)
