"""Speculation and parallel samples: plain decoding's tokens, fewer steps, pages that return."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_steps import teacher_forced
from test_generate import CONFIG, MODEL, PROMPTS, SAMPLING, SHAPE, TOKENIZER, V, tokens_of, watch

from paxattn import DraftModel, NGram, generate, loops, page_table, stream
from paxattn.models import Decoder
from paxattn.ngram import propose_ngram
from paxattn.sampling import SamplingParams

DRAFT = Decoder(CONFIG, rngs=nnx.Rngs(1))


def plain_ngram(history, num_tokens, longest, branches):
    """`propose_ngram` of one row, written down again in plain Python."""
    found = {}  # by first token, in order of preference
    for size in range(longest, 0, -1):
        latest = history[len(history) - size :]
        for end in range(len(history) - 1, size - 1, -1):
            if len(latest) == size and history[end - size : end] == latest:
                found.setdefault(history[end], history[end : end + num_tokens])
    return list(found.values())[:branches]


def test_ngram_finds_the_latest_of_the_longest():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3, n).tolist() for n in (1, 2, 3, 5, 8, 13, 20, 20)]
    history = np.full((len(rows), 20), 1, np.int32)
    for row, tokens in zip(history, rows, strict=True):
        row[: len(tokens)] = tokens
    lens = jnp.array([len(tokens) for tokens in rows])
    for k, longest, branches in ((1, 1, 1), (3, 2, 2), (4, 3, 1), (2, 9, 4)):
        guesses, count = propose_ngram(
            jnp.array(history), lens, num_tokens=k, longest=longest, branches=branches
        )
        chains = np.moveaxis(np.asarray(guesses), 2, 1).tolist()
        found = [[[t for t in chain if t >= 0] for chain in row if chain[0] >= 0] for row in chains]
        assert found == [plain_ngram(tokens, k, longest, branches) for tokens in rows]
        assert count.tolist() == [max(map(len, row), default=0) for row in found]


TREE = DraftModel(model=MODEL, num_tokens=3, branches=3)
DRAFTERS = [
    NGram(num_tokens=4),
    DraftModel(model=MODEL, num_tokens=3),  # always right, but for rounding
    DraftModel(model=DRAFT, num_tokens=3),  # mostly wrong
    pytest.param(NGram(num_tokens=4, branches=2), marks=pytest.mark.slow),
    pytest.param(TREE, marks=pytest.mark.variants),
    pytest.param(DraftModel(model=DRAFT, num_tokens=3, branches=3), marks=pytest.mark.variants),
]
IDS = ["ngram", "itself", "other", "ngram-tree", "itself-tree", "other-tree"]
# They repeat themselves, so that looking them up succeeds now and then.
REPEATS = [(prompt * 4)[:16] for prompt in PROMPTS]


@pytest.mark.parametrize("drafter", DRAFTERS, ids=IDS)
def test_speculation_changes_no_token(monkeypatch, drafter):
    tables = []
    watch(monkeypatch, lambda state: tables.append(getattr(state, "decode", state).pool.table))
    for sampling in ([SamplingParams()] * 4, SAMPLING):
        options = {**SHAPE, "sampling": sampling, "max_new_tokens": [12, 5, 1, 12]}
        plain = generate(MODEL, REPEATS, **options)
        fast = generate(MODEL, REPEATS, draft=drafter, **options)
        assert tokens_of(fast) == tokens_of(plain)
        for a, b in zip(fast.completions, plain.completions, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
            assert a.finish_reason == b.finish_reason
        page_table.check_invariants(tables[-1])
        assert int(tables[-1].num_free) == SHAPE["num_pages"]
        assert 0 <= fast.stats.accepted <= fast.stats.drafted / drafter.branches
        if isinstance(drafter, DraftModel) and drafter.model is MODEL:
            assert fast.stats.accepted == fast.stats.drafted / drafter.branches > 0
            assert fast.stats.num_steps < plain.stats.num_steps / 2


@pytest.mark.variants
@pytest.mark.parametrize("k", [1, *(pytest.param(k, marks=pytest.mark.slow) for k in range(2, 9))])
@pytest.mark.parametrize(
    "drafter", [NGram, pytest.param(partial(DraftModel, model=DRAFT), marks=pytest.mark.slow)]
)
def test_other_draft_lengths(drafter, k):
    plain = generate(MODEL, PROMPTS, **SHAPE)
    fast = generate(MODEL, PROMPTS, draft=drafter(num_tokens=k), **SHAPE)
    assert tokens_of(fast) == tokens_of(plain)


def leave(monkeypatch, num_free):
    """Once the prompts are stored, somebody else takes all other pages, the draft model's too."""

    def taken(pool):
        table = jax.device_get(pool.table)
        pages = table.free_pages[num_free : table.num_free]
        refs = np.array(table.ref_counts)
        refs[pages] = 1
        table = dataclasses.replace(table, ref_counts=refs, num_free=np.int32(num_free))
        return dataclasses.replace(pool, table=jax.tree.map(jnp.asarray, table))

    def started(*args, **options):
        state = start(*args, **options)
        decode = dataclasses.replace(state.decode, pool=taken(state.decode.pool))
        return dataclasses.replace(state, decode=decode, pool=taken(state.pool))

    start = loops.start
    monkeypatch.setattr(loops, "start", started)


def test_pressure_stops_guessing_before_it_stops_a_row(monkeypatch):
    whole = generate(MODEL, PROMPTS, **SHAPE)
    leave(monkeypatch, 3)
    fast = generate(MODEL, PROMPTS, draft=DRAFTERS[1], **SHAPE)
    reasons = [c.finish_reason for c in fast.completions]
    assert set(reasons) == {"length", "out_of_pages"}
    for completion, tokens in zip(fast.completions, tokens_of(whole), strict=True):
        assert completion.tokens == tokens[: len(completion.tokens)]


def test_a_next_token_comes_before_guesses(monkeypatch):
    """One page is left: the last row needs it, and the first would like it for a guess."""
    prompts = [PROMPTS[3][:n] for n in (4, 8, 12, 5)]
    leave(monkeypatch, 1)
    options = {**SHAPE, "max_new_tokens": [2, 1, 1, 1]}
    fast = generate(MODEL, prompts, draft=DRAFTERS[1], prefix_cache=False, **options)
    assert [c.finish_reason for c in fast.completions] == ["length"] * 4
    assert fast.stats.peak_pages == SHAPE["num_pages"]


def test_stop_tokens_among_the_guesses_end_a_row_there():
    whole = tokens_of(generate(MODEL, PROMPTS, **SHAPE))
    stops = [whole[0][2], whole[3][4]]
    plain = generate(MODEL, PROMPTS, stop_token_ids=stops, **SHAPE)
    fast = generate(MODEL, PROMPTS, stop_token_ids=stops, draft=DRAFTERS[1], **SHAPE)
    assert tokens_of(fast) == tokens_of(plain)
    assert [c.finish_reason for c in fast.completions] == [
        c.finish_reason for c in plain.completions
    ]


def test_stop_strings_end_rows_that_guess():
    options = {**SHAPE, "tokenizer": TOKENIZER, "sampling": SAMPLING}
    prompts = [(prompt * 4)[:16] for prompt in PROMPTS]
    plain = generate(MODEL, prompts, **options).completions
    middle = max(plain, key=lambda completion: len(completion.text)).text[1:3]
    cut = generate(MODEL, prompts, stop=[middle], draft=DRAFTERS[0], **options).completions
    assert [c.text for c in cut] == [c.text.split(middle)[0] for c in plain]
    assert [c.finish_reason == "stop" for c in cut] == [middle in c.text for c in plain]
    assert any(c.finish_reason == "stop" for c in cut)


@pytest.mark.variants
def test_penalties_count_the_guesses():
    params = [
        SamplingParams(repetition_penalty=1e6),
        SamplingParams(frequency_penalty=0.3),
        SamplingParams(presence_penalty=1e6),
        SamplingParams(frequency_penalty=-0.2, repetition_penalty=1.1),
    ]
    options = {**SHAPE, "sampling": [params[i % 4] for i in range(len(PROMPTS))]}
    plain = tokens_of(generate(MODEL, PROMPTS, **options))
    assert plain != tokens_of(generate(MODEL, PROMPTS, **SHAPE))
    for draft in (DRAFTERS[0], DRAFTERS[1], TREE):
        assert tokens_of(generate(MODEL, PROMPTS, draft=draft, **options)) == plain


def test_streaming_is_the_same():
    got = [[] for _ in PROMPTS]
    for delta in stream(MODEL, PROMPTS, draft=DRAFTERS[1], **SHAPE):
        got[delta.index] += delta.tokens
    assert got == tokens_of(generate(MODEL, PROMPTS, **SHAPE))


@pytest.mark.parametrize("branches", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_speculation_samples_from_the_target(branches):
    """Chi-square of the second token, given the first, against the model's own probabilities."""
    rng = np.random.default_rng(0)
    near = jax.tree.map(lambda x: x + rng.normal(size=x.shape, scale=0.02).astype(x.dtype), MODEL)
    draft = DraftModel(model=near, num_tokens=3, branches=branches)
    prompt, tokens, accepted, drafted = PROMPTS[3][:8], [], 0, 0
    for seed in range(0, 512, 4):
        sampling = [SamplingParams(temperature=1.5, top_k=7, seed=seed + i) for i in range(4)]
        options = {**SHAPE, "sampling": sampling, "max_new_tokens": 3}
        out = generate(MODEL, [prompt] * 4, draft=draft, prefix_cache=False, **options)
        tokens += tokens_of(out)
        accepted, drafted = accepted + out.stats.accepted, drafted + out.stats.drafted
    assert 0.1 < accepted / drafted < 0.95
    tokens = np.array(tokens)
    seen, times = np.unique(tokens[:, 0], return_counts=True)
    first = seen[times.argmax()]
    second = tokens[tokens[:, 0] == first, 1]

    logits = teacher_forced(MODEL, [[*prompt, first]], [[0]])[0][-1]
    kept = np.argsort(-logits)[:7]
    assert set(second) <= set(kept)
    expected = np.exp(logits[kept] / 1.5) / np.exp(logits[kept] / 1.5).sum() * len(second)
    chi2 = ((np.bincount(second, minlength=V)[kept] - expected) ** 2 / expected).sum()
    assert chi2 < 22.5  # the 0.1 % point for 6 degrees of freedom
    assert len(second) > 60


def test_samples_are_separate_requests_that_share_pages(monkeypatch):
    sampling = [SamplingParams(temperature=1.5, seed=10), SamplingParams(temperature=1.5, seed=90)]
    prompts = [PROMPTS[3], PROMPTS[0]]
    shared = generate(MODEL, prompts, num_samples=4, sampling=sampling, **SHAPE)
    separate = [
        generate(
            MODEL,
            [prompt] * 4,
            sampling=[SamplingParams(temperature=1.5, seed=one.seed + j) for j in range(4)],
            prefix_cache=False,
            **SHAPE,
        )
        for prompt, one in zip(prompts, sampling, strict=True)
    ]
    assert tokens_of(shared) == [tokens for each in separate for tokens in tokens_of(each)]
    assert len({tuple(tokens) for tokens in tokens_of(shared)}) == 8
    assert [len(c.prompt_tokens) for c in shared.completions] == [16] * 4 + [5] * 4
    # 3 full pages of the first prompt and 1 of the second are shared by four rows each.
    alone = sum(each.stats.peak_pages for each in separate)
    assert shared.stats.peak_pages == alone - 3 * 3 - 3 * 1


@pytest.mark.variants
def test_scrub_leaves_nothing_of_samples_and_guesses(monkeypatch):
    options = {**SHAPE, "sampling": SamplingParams(temperature=1.0), "num_samples": 2}
    options["draft"] = DraftModel(model=DRAFT, num_tokens=3)
    states = []
    watch(monkeypatch, states.append)
    found = tokens_of(generate(MODEL, PROMPTS, scrub=True, **options))
    last = states[-1]
    for pool in (last.pool, last.decode.pool):
        assert int(pool.table.num_free) == SHAPE["num_pages"]
        assert not np.asarray(pool.cache.k_pages).any()
        assert not np.asarray(pool.cache.v_pages).any()
    for j in range(2):
        sampling = SamplingParams(temperature=1.0, seed=j)
        assert found[j::2] == tokens_of(generate(MODEL, PROMPTS, sampling=sampling, **SHAPE))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draft": 4}, TypeError, "draft is 4: must be an NGram or a DraftModel"),
        ({"draft": DRAFT}, TypeError, "draft is a Decoder: must be an NGram or a DraftModel"),
        ({"draft": NGram(num_tokens=0)}, ValueError, "draft.num_tokens=0 must be at least 1"),
        ({"draft": NGram(longest=1.5)}, TypeError, "draft.longest is 1.5: must be an integer"),
        ({"num_samples": 0}, ValueError, "num_samples=0 must be at least 1"),
        ({"num_samples": "2"}, TypeError, "num_samples is '2': must be an integer"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        generate(MODEL, [[1]], **SHAPE, **options)


def test_another_vocabulary_is_refused():
    other = Decoder(CONFIG.__class__(**{**vars(CONFIG), "vocab_size": V - 1}), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"the draft model has {V - 1} tokens, the model {V}"):
        generate(MODEL, [[1]], draft=DraftModel(model=other), **SHAPE)
