"""Trees of guesses: masks, attention over them, and generation that they must not change."""

import dataclasses

import attention_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case
from flax import nnx
from test_attention import run, same
from test_generate import MODEL, PROMPTS, SAMPLING, SHAPE, tokens_of, watch
from test_speculative import DRAFT, REPEATS

from paxattn import DraftModel, NGram, generate, stream
from paxattn.attention import checks, choice
from paxattn.decode_step import Status
from paxattn.kv_cache import KVCache
from paxattn.sampling import SamplingParams
from paxattn.target import Target
from paxattn.tree import Tree, comb, spine, tree_arrays, walk


def random_tree(rng, size):
    return Tree(parents=(-1, *(int(rng.integers(0, node)) for node in range(1, size))))


def test_shapes_of_trees():
    assert comb(2, 3).parents == (-1, 0, 0, 0, 1, 2, 3)
    assert spine(3, 2).parents == (-1, 0, 0, 1, 1, 3, 3)
    assert comb(3, 1) == spine(3, 1) == Tree(parents=(-1, 0, 1, 2))
    masks, depths = tree_arrays(spine(2, 2))
    assert masks.tolist() == [0b1, 0b11, 0b101, 0b1011, 0b10011]
    assert depths.tolist() == [0, 1, 1, 2, 2]
    assert int(tree_arrays(comb(31, 1))[0][-1]) == 2**32 - 1
    with pytest.raises(ValueError, match="a tree of 33 nodes must have at most 32"):
        tree_arrays(comb(8, 4))
    for parents in ((), (0,), (-1, 1), (-1, 0, -1)):
        with pytest.raises(ValueError, match="lower numbers than each node's own"):
            Tree(parents=parents)


@pytest.mark.parametrize(("make", "branches"), [(comb, 1), (comb, 3), (spine, 2), (spine, 3)])
def test_walk(make, branches):
    rng = np.random.default_rng(0)
    depth, rows = 3, 64
    tree = make(depth, branches)
    nodes = len(tree.parents)
    candidates, chosen = rng.integers(0, branches + 1, (2, rows, nodes))
    count = rng.integers(0, depth + 1, rows)
    path, kept = walk(tree, *map(jnp.asarray, (candidates, chosen, count)), branches)
    for row in range(rows):
        at, want = 0, [0]
        for level in range(count[row]):
            level_nodes = range(1 + level * branches, 1 + (level + 1) * branches)
            children = [n for n in level_nodes if tree.parents[n] == at]
            right = [n for n in children if candidates[row, n] == chosen[row, at]]
            if not right:
                break
            at = right[0]
            want.append(at)
        assert int(kept[row]) == len(want) - 1
        assert path[row].tolist() == want + [at] * (depth + 1 - len(want))


def tree_oracle(inputs, trees):
    """Each node on its own: the dense answer for the chain of its ancestors, behind the history."""
    o, lse = np.zeros(inputs.q.shape), np.full(inputs.q.shape[:2], -np.inf)
    size = inputs.case.page_size
    for row, tree in enumerate(trees):
        first = inputs.cu_q_lens[row]
        history = inputs.kv_lens[row] - len(tree.parents)
        place = lambda pages, t, row=row: pages[inputs.block_tables[row, t // size], :, t % size]  # noqa: E731
        for node, ancestors in enumerate(tree.is_ancestor()):
            seen = [*range(history), *(history + np.flatnonzero(ancestors))]
            pages = [np.stack([place(x, t) for t in seen], 1)[None]
                     for x in (inputs.k_pages, inputs.v_pages)]  # fmt: skip
            alone = dataclasses.replace(
                inputs,
                case=dataclasses.replace(inputs.case, page_size=len(seen)),
                q=inputs.q[first + node][None],
                k_pages=pages[0],
                v_pages=pages[1],
                block_tables=np.zeros((1, 1), np.int32),
                kv_lens=np.asarray([len(seen)], np.int32),
                cu_q_lens=np.asarray([0, 1], np.int32),
            )
            o[first + node], lse[first + node] = (x[0] for x in cases.oracle(alone))
    return o, lse


@pytest.mark.parametrize("window", [None, 2, 9])
def test_attention_over_trees(window):
    """A token sees what is stored and its ancestors, at distances that depths say."""
    rng = np.random.default_rng(1)
    trees = [random_tree(rng, 8), Tree(parents=(-1,)), spine(3, 2), comb(2, 3)]
    sizes = [len(tree.parents) for tree in trees]
    case = Case(
        q_lens=tuple(sizes), kv_lens=(9, 21, 30, 13), heads=(4, 2), head_dim=16, page_size=8,
        window=window, sinks=True, padding=2, max_q_len=8,
    )  # fmt: skip
    inputs = cases.make(case)
    masks = np.concatenate([*(tree_arrays(tree)[0] for tree in trees), np.full(2, 7, np.uint32)])
    window = {"sliding_window": jnp.int32(window or 0)}  # traced: one compilation
    got = run(inputs, ancestors=masks, **window)
    for have, want in zip(got, tree_oracle(inputs, trees), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-5)
    same(run(cases.poison(inputs), ancestors=masks, **window), got)
    chains = np.concatenate([tree_arrays(comb(n - 1, 1))[0] for n in sizes] + [masks[-2:]])
    same(run(inputs, ancestors=chains, **window), run(inputs, **window))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ancestors": np.ones(3, np.uint32)}, r"ancestors is uint32\[3\], must be uint32\[4\]"),
        ({"ancestors": np.ones(4, np.int32)}, r"ancestors is int32\[4\], must be uint32\[4\]"),
        ({"ancestors": np.ones(4, np.uint32), "causal": False}, "does not go with ancestors="),
    ],
)
def test_ancestors_that_do_not_fit(options, message):
    inputs = cases.make(Case(q_lens=(3, 1), kv_lens=(5, 5), max_q_len=3))
    with pytest.raises(ValueError, match=message):
        run(inputs, **options)


def test_kernels_decline_by_name():
    inputs = cases.make(Case(q_lens=(3, 1), kv_lens=(5, 5), dtype="float16", max_q_len=3))
    hopper = Target(platform="gpu", device_kind="NVIDIA H200")
    arrays = inputs.q, inputs.k_pages, inputs.v_pages
    request = checks.check(*arrays, **inputs.options, ancestors=np.ones(4, np.uint32))
    made = choice.consider(request, hopper, ("mosaic_gpu", "reference"))
    assert made.implementation == "reference"
    assert "ancestor masks" in dict(made.reasons)["mosaic_gpu"]


@pytest.mark.slow
@pytest.mark.parametrize("branches", [2, 3, 5])
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_other_topologies(k, branches):
    plain = generate(MODEL, REPEATS, sampling=SAMPLING, **SHAPE)
    for draft in (
        NGram(num_tokens=k, branches=branches),
        DraftModel(model=DRAFT, num_tokens=k, branches=branches),
    ):
        fast = generate(MODEL, REPEATS, sampling=SAMPLING, draft=draft, **SHAPE)
        assert tokens_of(fast) == tokens_of(plain)


@pytest.mark.slow
def test_samples_that_share_a_long_prompt_guess_in_trees():
    options = {"page_size": 4, "max_new_tokens": 12, "num_samples": 8}
    options["sampling"] = SamplingParams(temperature=2.0, seed=3)
    prompt = (REPEATS[0] * 3)[:44]
    plain = generate(MODEL, [prompt], **options)
    fast = generate(MODEL, [prompt], draft=NGram(num_tokens=4, branches=2), **options)
    assert tokens_of(fast) == tokens_of(plain)


def nearly(model, noise):
    """The model, a little off: its second choice is often the target's first."""
    other = nnx.clone(model)
    table = other.embed[...]
    other.embed[...] = table + noise * np.random.default_rng(5).standard_normal(table.shape)
    return other


@pytest.mark.variants
def test_poison_never_travels_with_what_is_kept(monkeypatch):
    """Every slot that no row owns is NaN before every step: moving what was kept spreads none."""
    draft = DraftModel(model=nearly(MODEL, 0.05), num_tokens=3, branches=3)
    options = {**SHAPE, "sampling": SamplingParams(temperature=1.0, seed=3)}
    plain = generate(MODEL, PROMPTS, **options)

    def clean(pool):
        table, cache = pool.table, pool.cache
        owned = np.zeros((cache.num_pages, cache.page_size), bool)
        for pages, length in zip(
            *map(np.asarray, (table.block_tables, table.kv_lens)), strict=True
        ):
            token = np.arange(length)
            owned[pages[token // cache.page_size], token % cache.page_size] = True
        owned = jnp.asarray(owned)[None, :, None, :, None]
        cache = KVCache(
            k_pages=jnp.where(owned, cache.k_pages, jnp.nan),
            v_pages=jnp.where(owned, cache.v_pages, jnp.nan),
        )
        return dataclasses.replace(pool, cache=cache)

    left_behind = []

    def poison(state):
        decode = state.decode
        running = np.asarray(decode.status) == Status.RUNNING
        left_behind.append((decode.pool.table.kv_lens - state.pool.table.kv_lens)[running])
        decode = dataclasses.replace(decode, pool=clean(decode.pool))
        return dataclasses.replace(state, decode=decode, pool=clean(state.pool))

    watch(monkeypatch, poison)
    got = [[] for _ in PROMPTS]
    running = stream(MODEL, PROMPTS, draft=draft, **options)
    for delta in running:
        got[delta.index] += delta.tokens
    assert got == tokens_of(plain)
    assert running.stats().accepted > 0
    # Second guesses were kept, which the draft model had not stored: it catches up.
    assert {0, 1} == set(np.concatenate(left_behind).tolist())


@pytest.mark.slow
def test_branches_find_what_the_first_guess_misses():
    sampling = SamplingParams(temperature=1.0, seed=3)
    draft = DraftModel(model=nearly(MODEL, 0.05), num_tokens=3)
    chain = generate(MODEL, PROMPTS, draft=draft, sampling=sampling, **SHAPE)
    tree = generate(
        MODEL, PROMPTS, draft=dataclasses.replace(draft, branches=3), sampling=sampling, **SHAPE
    )
    assert tokens_of(tree) == tokens_of(chain)
    assert tree.stats.num_steps <= chain.stats.num_steps
    assert tree.stats.accepted > chain.stats.accepted


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (NGram(branches=0), "draft.branches=0 must be at least 1"),
        (NGram(num_tokens=8, branches=4), "must be at most 31 guesses together"),
    ],
)
def test_bad_input(draft, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, [[1]], draft=draft, **SHAPE)
