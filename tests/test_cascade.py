"""Shared prefixes: which rows are grouped, and that reading once changes nothing but rounding."""

import dataclasses
import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case
from test_attention import check, run, same

from paxattn.attention import paged_attention
from paxattn.attention.merge import merge
from paxattn.shared_prefix import find_shared_prefix
from paxattn.tree import comb, tree_arrays

# A row without tokens, five rows that share 6 pages, one alone, and four that share 4 pages.
ROWS = dict(
    q_lens=(1, 2, 1, 0, 3, 1, 1, 1, 2, 1, 1, 1),
    kv_lens=(0, 60, 53, 9, 55, 50, 49, 9, 40, 35, 34, 40),
)
GROUPS = ((6, (1, 2, 4, 5, 6)), (4, (8, 9, 10, 11)))
CASE = Case(**ROWS, heads=(4, 2), head_dim=16, page_size=8, padding=3, max_q_len=3)


def shared_case(case=CASE, groups=GROUPS, seed=0):
    inputs = cases.make(case, seed)
    tables, owned = inputs.block_tables.copy(), inputs.owned.copy()
    for pages, rows in groups:
        for row in rows[1:]:
            old = tables[row, :pages]
            owned[old[old < len(owned)]] = False
            tables[row, :pages] = tables[rows[0], :pages]
    return dataclasses.replace(inputs, block_tables=tables, owned=owned)


@jax.jit
def find(tables, lens, cu):
    return find_shared_prefix(
        tables, lens, cu, num_tokens=len(tables) + 8, page_size=CASE.page_size, num_pages=1000
    )


def found(inputs):
    # In a pool of 1000 pages and tables of 128 entries, so that one compilation serves.
    num_pages, width = len(inputs.owned), inputs.block_tables.shape[1]
    tables = np.full((len(inputs.kv_lens), 128), 1000, np.int32)
    tables[:, :width] = np.where(inputs.block_tables == num_pages, 1000, inputs.block_tables)
    shared = find(tables, inputs.kv_lens, inputs.cu_q_lens)
    fit = lambda x: jnp.asarray(np.where(x == 1000, num_pages, x)[:, :width])  # noqa: E731
    return dataclasses.replace(
        shared,
        members=shared.members[: len(inputs.q)],
        group_tables=fit(shared.group_tables),
        rest_tables=fit(shared.rest_tables),
    )


def test_groups():
    inputs = shared_case()
    shared = found(inputs)
    assert bool(shared.pays)
    skipped = (inputs.kv_lens - np.asarray(shared.rest_kv_lens)).tolist()
    assert skipped == [0, 48, 48, 0, 48, 48, 48, 0, 32, 32, 32, 32]
    lens, starts = np.asarray(shared.group_kv_lens), np.asarray(shared.group_cu_q_lens)
    spans = [(int(lens[i]), int(starts[i]), int(starts[i + 1])) for i in np.flatnonzero(lens)]
    assert spans == [(48, 0, 9), (32, 10, 15)]  # the row without tokens counts with who follows
    assert (np.diff(starts) >= 0).all()
    assert starts[-1] == 15
    members = np.asarray(shared.members)
    assert members.tolist() == [False] + [True] * 8 + [False] + [True] * 5 + [False] * 3
    np.testing.assert_array_equal(
        np.asarray(shared.rest_tables)[1, :2], inputs.block_tables[1, 6:8]
    )


@pytest.mark.parametrize(
    ("groups", "kv_lens"),
    [
        ((), None),  # nothing in common
        (((6, (1, 2, 4)),), None),  # too few rows
        (((1, (1, 2, 4, 5, 6)),), None),  # too little
        # All share their pages, but somebody's query may lie in the first of them.
        (((6, tuple(range(12))),), (60, 60, 7, 60, 60, 60, 7, 60, 60, 7, 60, 60)),
        # The longest row shares nothing: rows that walk in step would gain nothing.
        (((6, tuple(range(11))),), (60,) * 11 + (900,)),
    ],
)
def test_no_groups(groups, kv_lens):
    case = dataclasses.replace(CASE, q_lens=(1,) * 12, kv_lens=kv_lens or (50,) * 12)
    inputs = shared_case(dataclasses.replace(case, spare=0), groups)
    shared = found(inputs)
    assert not bool(shared.pays)
    np.testing.assert_array_equal(shared.rest_tables, inputs.block_tables)
    np.testing.assert_array_equal(shared.rest_kv_lens, inputs.kv_lens)


def test_samples_of_several_prompts_under_one_system_prompt():
    """The bound that saves most: the samples' own prompts here, not the one page all share."""
    case = dataclasses.replace(CASE, q_lens=(1,) * 12, kv_lens=(70,) * 12)
    prompts = tuple((8, tuple(range(i, i + 4))) for i in (0, 4, 8))
    shared = found(shared_case(case, (*prompts, (1, tuple(range(12))))))
    assert np.asarray(shared.group_kv_lens)[:4].tolist() == [64, 64, 64, 0]
    shared = found(shared_case(case, (*prompts, (7, tuple(range(12))))))
    assert np.asarray(shared.group_kv_lens)[:2].tolist() == [56, 0]


def test_a_group_must_fill_a_quarter_of_the_batch():
    case = dataclasses.replace(CASE, q_lens=(1,) * 40, kv_lens=(60,) * 40)
    for size, pays in ((8, False), (10, True)):
        groups = tuple((7, tuple(range(i, i + size))) for i in range(0, 40, size))
        assert bool(found(shared_case(case, groups)).pays) == pays


@pytest.mark.parametrize(
    "options",
    [
        {"sinks": True, "soft_cap": 2.0, "layers": 2},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"page_dtype": "float8_e4m3fn"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_matches_oracle_and_ignores_poison(options):
    inputs = shared_case(dataclasses.replace(CASE, **options))
    shared = found(inputs)
    got = run(inputs, shared=shared)
    check(inputs, got)
    same(run(cases.poison(inputs), shared=shared), got)


def test_guesses_see_all_that_is_shared():
    """Whose ancestors are told among the new tokens only: the shared ones are before them all."""
    inputs = shared_case(dataclasses.replace(CASE, page_dtype="int8"))
    masks = np.concatenate([tree_arrays(comb(1, 2))[0][:n] for n in (*CASE.q_lens, CASE.padding)])
    got = run(inputs, ancestors=masks, shared=found(inputs))
    for have, want in zip(got, run(inputs, ancestors=masks), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5)


def test_a_fixed_split_goes_without():
    """What rows share is no matter of one row."""
    inputs = shared_case()

    def parts(**options):
        call = functools.partial(paged_attention, shared=found(inputs), **options)
        traced = jax.make_jaxpr(lambda *arrays: call(*arrays, **inputs.options))
        arrays = inputs.q, inputs.k_pages, inputs.v_pages
        return str(traced(*arrays)).count("name=paged_attention_reference")

    assert (parts(), parts(fixed_split=64)) == (2, 1)


def test_a_window_that_hides_something_rules_it_out():
    """Layer by layer, as data; and what does not pay is the plain form, bit for bit."""
    inputs = shared_case()
    shared = found(inputs)
    plain = jax.jit(lambda window: run_jitted(inputs, None, window))
    fast = jax.jit(lambda window: run_jitted(inputs, shared, window))
    for window in (0, 60, 59, 7):
        one = dataclasses.replace(inputs.case, window=window or None)
        got = [np.asarray(x, np.float64) for x in fast(jnp.int32(window))]
        check(dataclasses.replace(inputs, case=one), got)
        if window in (59, 7):
            same(fast(jnp.int32(window)), plain(jnp.int32(window)))


def run_jitted(inputs, shared, window):
    arrays = (jnp.asarray(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages))
    options = inputs.options | {"sliding_window": window}
    return paged_attention(*arrays, **options, shared=shared, return_lse=True)


def test_gradients_are_those_of_the_plain_form():
    inputs = shared_case(dataclasses.replace(CASE, sinks=True))
    arrays = [jnp.asarray(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages, inputs.sinks)]
    options = {k: v for k, v in inputs.options.items() if k != "sinks"}
    weights = jnp.asarray(np.random.default_rng(3).standard_normal(inputs.q.shape, np.float32))

    def gradients(shared):
        def loss(q, k, v, sinks):
            o = paged_attention(q, k, v, sinks=sinks, shared=shared, **options)
            return (o * weights).sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)

    both = jax.jit(lambda shared: (gradients(None), gradients(shared)))(found(inputs))
    for plain, fast in zip(*both, strict=True):
        np.testing.assert_allclose(fast, plain, atol=2e-5)


def test_merge():
    o = jnp.asarray([[[1.0, 2.0]], [[3.0, 4.0]], [[0.0, 0.0]]])
    lse = jnp.asarray([[0.0], [1.0], [-jnp.inf]])
    join = jax.jit(lambda *parts: merge(jnp.stack(parts[::2]), jnp.stack(parts[1::2])))
    none = jnp.zeros_like(o), jnp.full_like(lse, -jnp.inf)
    same(join(o, lse, *none), (o, lse))  # one side empty; both in the last
    same(join(*none, o, lse), (o, lse))
    mixed, total = join(o, lse, jnp.ones_like(o), lse)
    np.testing.assert_allclose(mixed[:2], (o[:2] + 1) / 2)
    np.testing.assert_allclose(total, lse + np.log(2.0), rtol=1e-6)
    assert np.isneginf(total[2])


def test_gradients_of_merged_parts_are_finite_where_all_are_empty():
    o, lse = jnp.ones((2, 3, 1, 4)), jnp.asarray([[0.0, 1.0, -jnp.inf], [2.0, -jnp.inf, -jnp.inf]])

    def loss(o, lse):
        o, lse = merge(o, lse)
        return o.sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

    for found in jax.grad(loss, argnums=(0, 1))(o, lse[..., None]):
        assert np.isfinite(found).all()
