"""Beam search: what transformers finds, pages that come back, pressure, bad input."""

import dataclasses
import math

import numpy as np
import pytest
from make_beams import CASES, NAMES, NEW_TOKENS, STOP_IDS
from make_fixtures import FIXTURES

from paxattn import generate, load
from paxattn.sampling import SamplingParams

MARKS = {
    (NAMES[0], 4): [],
    (NAMES[1], 2): pytest.mark.variants,
    (NAMES[2], 8): pytest.mark.variants,
}
SHAPE = {"page_size": 8, "max_new_tokens": NEW_TOKENS, "stop_token_ids": STOP_IDS}


def prompts_of(name):
    known = np.load(FIXTURES / name / "expected.npz")
    return [p.tolist() for p in np.split(known["prompts"], np.cumsum(known["prompt_lens"])[:-1])]


@pytest.mark.parametrize(
    ("name", "num_beams"),
    [
        pytest.param(name, k, marks=MARKS.get((name, k), pytest.mark.slow))
        for name in NAMES
        for k in (2, 4, 8)
    ],
)
def test_transformers_finds_the_same(name, num_beams):
    model = load(FIXTURES / name, dtype="float32").model
    prompts = prompts_of(name)
    recorded = np.load(FIXTURES / name / "beams.npz")
    found = zip(recorded["tokens"], recorded["lens"], recorded["scores"], strict=True)
    for case in CASES:
        expected = [next(found) for _ in prompts]
        if case[0] != num_beams:
            continue
        out = generate(
            model,
            prompts,
            num_beams=num_beams,
            early_stopping=case[1],
            length_penalty=case[2],
            num_return_sequences=num_beams,
            **SHAPE,
        )
        for i, (tokens, lens, scores) in enumerate(expected):
            ours = out.completions[i * num_beams : (i + 1) * num_beams]
            np.testing.assert_allclose([c.score for c in ours], scores[:num_beams], atol=1e-4)
            # Where scores tie, either order is right.
            assert sorted(c.tokens for c in ours) == sorted(
                row[:n].tolist() for row, n in zip(tokens[:num_beams], lens, strict=False)
            )
            for c in ours:
                total = sum(c.logprobs) / len(c.tokens) ** case[2]
                np.testing.assert_allclose(c.score, total, atol=1e-4)
                assert (c.finish_reason == "stop") == (c.tokens[-1] in STOP_IDS)


@pytest.fixture(scope="module")
def llama():
    return load(FIXTURES / "llama3", dtype="float32").model


def test_one_beam_is_greedy(llama):
    greedy = np.load(FIXTURES / "llama3" / "expected.npz")["tokens"]  # transformers'
    out = generate(llama, prompts_of("llama3"), num_beams=1, **SHAPE)
    for completion, tokens in zip(out.completions, greedy.tolist(), strict=True):
        stops = [i for i, token in enumerate(tokens) if token in STOP_IDS]
        assert completion.tokens == tokens[: min([i + 1 for i in stops] + [NEW_TOKENS])]


def test_pressure_ends_only_those_affected_and_scrub_changes_nothing(llama):
    prompts = prompts_of("llama3")
    options = {**SHAPE, "num_beams": 4, "num_return_sequences": 4}
    whole = generate(llama, prompts, **options)
    tight = generate(llama, prompts, num_pages=18, scrub=True, **options)
    reasons = {c.finish_reason for c in tight.completions}
    assert "out_of_pages" in reasons
    assert reasons - {"out_of_pages"}
    assert tight.stats.peak_pages <= 18
    by_prompt = {tuple(c.prompt_tokens): [] for c in whole.completions}
    for c in whole.completions:
        by_prompt[tuple(c.prompt_tokens)].append(c)
    survivors = [c for c in tight.completions if c.finish_reason != "out_of_pages"]
    hit = {tuple(c.prompt_tokens) for c in tight.completions if c.finish_reason == "out_of_pages"}
    for c in survivors:
        if tuple(c.prompt_tokens) not in hit:
            assert dataclasses.replace(c, score=None) in [
                dataclasses.replace(w, score=None) for w in by_prompt[tuple(c.prompt_tokens)]
            ]


def test_no_tokens_asked_for(llama):
    """The completions of prompt i are at i * num_return_sequences, come what may."""
    options = {**SHAPE, "max_new_tokens": [0, NEW_TOKENS, 0], "num_beams": 4}
    out = generate(llama, prompts_of("llama3"), num_return_sequences=2, **options)
    assert [len(c.tokens) > 0 for c in out.completions] == [False] * 2 + [True] * 2 + [False] * 2
    assert [c.score for c in out.completions[:2]] == [0.0, -math.inf]
    assert generate(llama, [], num_beams=2).completions == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_beams": 0}, ValueError, "num_beams=0 must be at least 1"),
        ({"num_beams": 1.5}, TypeError, "num_beams is 1.5: must be an integer"),
        ({"num_beams": 2, "num_return_sequences": 3}, ValueError, "must be between 1 and num_be"),
        ({"num_beams": 2, "early_stopping": "maybe"}, ValueError, "early_stopping='maybe' must"),
        ({"num_beams": 2, "early_stopping": 1}, ValueError, "early_stopping=1 must be False, True"),
        ({"num_beams": 2, "length_penalty": float("nan")}, ValueError, "length_penalty=nan must"),
        (
            {"num_beams": 2, "length_penalty": -50, "max_new_tokens": 10},
            ValueError,
            "length_penalty=-50 is too far from 0 for 10 new tokens",
        ),
        ({"num_beams": 2, "num_samples": 2}, ValueError, "num_samples= does not go with num_beams"),
        ({"num_beams": 2, "sampling": SamplingParams()}, ValueError, "sampling= does not go with"),
        ({"length_penalty": 2.0}, ValueError, "beam search has these, pass num_beams= too"),
        ({"num_return_sequences": 2}, ValueError, "pass num_beams= too"),
    ],
)
def test_bad_input(llama, options, error, message):
    with pytest.raises(error, match=message):
        generate(llama, [[1, 2]], **options)
