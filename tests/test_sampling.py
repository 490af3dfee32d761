"""Sampling against plain numpy, and its independence of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxattn.penalties import count_generated, count_tokens, penalize
from paxattn.sampling import SamplingParams, row_sampling, sample

V = 64
R = 8
RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(R, V)) * 2, jnp.float32)
STEP = jax.jit(lambda *args, counts: sample(*args, lambda: counts))


@pytest.fixture(autouse=True)
def _strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


def draw(logits, params, num_generated=None, counts=None):
    rows = logits.shape[0]
    num_generated = jnp.zeros(rows, jnp.int32) if num_generated is None else num_generated
    counts = jnp.zeros(logits.shape, jnp.int32) if counts is None else counts
    params = params if isinstance(params, list) else [params] * rows
    return STEP(logits, row_sampling(params, rows), num_generated, counts=counts)


def allowed_by_numpy(x, params):
    """The tokens that transformers' warpers would keep, one row, in float64."""
    x = np.asarray(x, np.float64).copy()
    if params.top_k:
        x[x < np.sort(x)[-min(params.top_k, x.size)]] = -np.inf
    if params.top_p < 1:
        order = np.argsort(-x)
        mass = np.exp(x - x.max())
        mass /= mass.sum()
        kept = order[: int(np.searchsorted(np.cumsum(mass[order]), params.top_p)) + 1]
        x[np.setdiff1d(np.arange(x.size), kept)] = -np.inf
    if params.min_p:
        x[np.exp(x - x.max()) < params.min_p] = -np.inf
    return set(np.flatnonzero(np.isfinite(x)).tolist())


def test_greedy_is_argmax_and_logprobs_are_the_models_own():
    tokens, logprobs = draw(LOGITS, SamplingParams())
    np.testing.assert_array_equal(tokens, np.argmax(LOGITS, axis=1))
    expected = jax.nn.log_softmax(LOGITS)[jnp.arange(R), tokens]
    np.testing.assert_allclose(logprobs, expected, atol=1e-6)
    hot, logprobs = draw(LOGITS, SamplingParams(temperature=3.0, top_k=7, seed=3))
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(LOGITS)[jnp.arange(R), hot], atol=1e-5)


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 10 * V},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"top_k": 12, "top_p": 0.7, "min_p": 0.05},
    ],
    ids=str,
)
def test_filters_keep_exactly_what_sorting_would(filters):
    params = SamplingParams(temperature=1.0, **filters)
    rows = jnp.tile(LOGITS[:1], (2048, 1))
    many = [SamplingParams(temperature=1.0, seed=i, **filters) for i in range(2048)]
    drawn = set(np.asarray(draw(rows, many)[0]).tolist())
    allowed = allowed_by_numpy(LOGITS[0], params)
    assert drawn <= allowed
    likely = np.exp(np.asarray(LOGITS[0]))
    mass = likely[sorted(allowed)] / likely[sorted(allowed)].sum()
    # Whatever has a 1 % chance fails to come up in 2,048 draws once in 10**9.
    assert {t for t, m in zip(sorted(allowed), mass, strict=True) if m > 0.01} <= drawn


def test_samples_follow_the_distribution():
    n, temperature = 2048, 0.7
    rows = jnp.tile(LOGITS[:1], (n, 1))
    many = [SamplingParams(temperature=temperature, seed=1000 + i) for i in range(n)]
    counts = np.bincount(np.asarray(draw(rows, many)[0]), minlength=V)
    expected = np.asarray(jax.nn.softmax(LOGITS[0] / temperature), np.float64) * n
    big = expected >= 5
    observed = np.append(counts[big], counts[~big].sum())
    expected = np.append(expected[big], expected[~big].sum())
    chi_square = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_a_row_does_not_depend_on_the_others():
    own = SamplingParams(temperature=1.0, top_p=0.9, seed=7)
    others = [SamplingParams(temperature=0.5 + i, top_k=i, seed=100 + i) for i in range(R)]
    others[3] = own
    crowd, _ = draw(LOGITS, others)
    alike, _ = draw(jnp.tile(LOGITS[3:4], (R, 1)), own)
    assert set(np.asarray(alike).tolist()) == {int(crowd[3])}


def test_seed_and_position_change_the_draw():
    rows = jnp.zeros((R, V), jnp.float32)
    same_seed = draw(rows, SamplingParams(temperature=1.0), jnp.arange(R, dtype=jnp.int32))[0]
    seeds = draw(rows, [SamplingParams(temperature=1.0, seed=2**32 - 1 - i) for i in range(R)])[0]
    assert len(set(np.asarray(same_seed).tolist())) > R // 2
    assert len(set(np.asarray(seeds).tolist())) > R // 2


def test_penalties_are_those_of_transformers_and_of_the_openai_api():
    """Repetition looks at prompt and output, frequency and presence at the output only."""
    lines = RNG.integers(0, V, (R, 40)).astype(np.int32)
    lens = RNG.integers(20, 40, R).astype(np.int32)
    prompt_lens = RNG.integers(0, 20, R).astype(np.int32)
    counts = count_tokens(jnp.asarray(lines), jnp.asarray(prompt_lens), jnp.asarray(lens), V)
    repetition = RNG.uniform(0.5, 2, R)
    frequency, presence = RNG.uniform(-2, 2, (2, R))
    params = [
        SamplingParams(repetition_penalty=a, frequency_penalty=b, presence_penalty=c)
        for a, b, c in zip(repetition, frequency, presence, strict=True)
    ]
    expected = np.asarray(LOGITS, np.float64).copy()
    for row, x in enumerate(expected):
        prompt, output = np.split(lines[row, : lens[row]], [prompt_lens[row]])
        for token in {*prompt.tolist(), *output.tolist()}:
            x[token] *= repetition[row] if x[token] < 0 else 1 / repetition[row]
        for token, times in zip(*np.unique(output, return_counts=True), strict=True):
            x[token] -= frequency[row] * times + presence[row]
    found = penalize(LOGITS, counts, row_sampling(params, R))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    tokens, _ = draw(LOGITS, params, counts=counts)
    np.testing.assert_array_equal(tokens, expected.argmax(axis=1))
    grown = count_generated(
        counts, jnp.asarray(lines[:, :3]), jnp.ones((R, 3), bool).at[0].set(False)
    )
    for row in range(R):
        new = np.bincount(lines[row, :3], minlength=V) * (row > 0)
        np.testing.assert_array_equal(grown[row] - counts[row], 2 * new)


def test_greedy_rows_beside_sampling_rows_stay_greedy():
    params = [SamplingParams(temperature=0.0 if i % 2 else 5.0, top_k=3) for i in range(R)]
    tokens, _ = draw(LOGITS, params)
    np.testing.assert_array_equal(tokens[1::2], np.argmax(LOGITS, axis=1)[1::2])


def test_logits_processor_runs_first():
    def only_five(logits, num_generated):
        return jnp.where(jnp.arange(V) == 5, logits, -jnp.inf) + 0 * num_generated[:, None]

    with jax.numpy_dtype_promotion("standard"):
        tokens, _ = sample(
            LOGITS,
            row_sampling([SamplingParams(temperature=1.0, top_p=0.5)] * R, R),
            jnp.zeros(R, jnp.int32),
            logits_processor=only_five,
        )
    assert (np.asarray(tokens) == 5).all()
    with jax.numpy_dtype_promotion("standard"):
        tokens, logprobs = sample(
            LOGITS,
            row_sampling([SamplingParams(temperature=i / 4, top_p=0.5) for i in range(R)], R),
            jnp.zeros(R, jnp.int32),
            logits_processor=lambda logits, _: logits.at[:, 6].set(jnp.inf),
        )
    assert (np.asarray(tokens) == 6).all()
    assert np.isfinite(np.asarray(logprobs)).all()


def test_ties_and_infinities():
    # All that tie with the last of the top-k stay, and nothing below them.
    half = jnp.tile(jnp.where(jnp.arange(V) < V // 2, 1.0, 0.0).astype(jnp.float32), (R, 1))
    drawn = draw(half, [SamplingParams(temperature=1.0, top_k=1, seed=i) for i in range(R)])[0]
    assert max(drawn.tolist()) < V // 2
    assert len(set(drawn.tolist())) > R // 2
    one = jnp.full((R, V), -jnp.inf, jnp.float32).at[:, 9].set(0.0)
    for params in (SamplingParams(), SamplingParams(temperature=2.0, top_p=0.1, min_p=0.9)):
        assert (np.asarray(draw(one, params)[0]) == 9).all()


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-37},
        {"temperature": 8e37},
        {"temperature": 1.0, "repetition_penalty": 1e-37},
        {"temperature": 1e-37, "repetition_penalty": 8e37},
        {"temperature": 0.0, "repetition_penalty": 8e37},
    ],
    ids=str,
)
def test_extremes_stay_finite(scale, extreme):
    logits = (LOGITS * scale).at[:, 7].set(-jnp.inf)
    filters = [{}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.1}]
    params = [SamplingParams(seed=i, **extreme, **filters[i % 4]) for i in range(R)]
    tokens, logprobs = draw(
        logits, params, counts=(jnp.arange(V) < jnp.full((R, 1), V // 2)).astype(jnp.int32)
    )
    assert np.isfinite(np.asarray(logprobs)).all()
    assert 7 not in tokens.tolist()
    if "repetition_penalty" not in extreme and scale / extreme["temperature"] > 1e6:
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))
    if scale / max(extreme["temperature"], scale) < 1e-6:
        assert len(set(tokens.tolist())) > R // 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1"),
        ("temperature", None),
        ("top_p", True),
        ("top_k", 1.5),
        ("top_k", float("nan")),
        ("seed", "0"),
    ],
)
def test_what_is_no_number_is_said(field, value):
    wanted = r"must be (0 \(greedy\) or )?an? (positive number|number|integer)"
    with pytest.raises(TypeError, match=f"{field}={value!r} {wanted}"):
        SamplingParams(**{field: value}).validate()


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("temperature", -0.1, r"0 \(greedy\) or a positive number \(from 1.18e-38 to 8.51e"),
        ("temperature", float("nan"), r"0 \(greedy\) or a positive number"),
        ("temperature", float("inf"), r"0 \(greedy\) or a positive number"),
        ("temperature", 1e-39, r"0 \(greedy\) or a positive number"),
        ("temperature", 1e38, r"0 \(greedy\) or a positive number"),
        ("top_k", -1, r"an integer in 0\.\.2\*\*31-1"),
        ("top_k", 2**31, r"an integer in 0\.\.2\*\*31-1"),
        ("top_p", 0.0, r"a number in \(0, 1\]"),
        ("top_p", 1.1, r"a number in \(0, 1\]"),
        ("top_p", float("nan"), r"a number in \(0, 1\]"),
        ("min_p", 2.0, r"a number in \[0, 1\]"),
        ("repetition_penalty", 0.0, r"a positive number \(from 1.18e-38 to 8.51e"),
        ("repetition_penalty", 1e39, "a positive number"),
        ("seed", -1, r"an integer in 0\.\.2\*\*32-1"),
        ("seed", 2**32, r"an integer in 0\.\.2\*\*32-1"),
    ],
)
def test_bad_parameters_name_value_and_range(field, value, wanted):
    with pytest.raises(ValueError, match=f"{field}=.*must be {wanted}"):
        row_sampling([SamplingParams(**{field: value})], 1)


def test_more_requests_than_rows():
    with pytest.raises(ValueError, match="3 requests do not fit num_rows=2"):
        row_sampling([SamplingParams()] * 3, 2)
