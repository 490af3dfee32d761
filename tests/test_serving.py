"""Continuous batching: outputs are those of one request at a time, whatever else is going on."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_steps import teacher_forced
from tiny import tiny_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from paxattn import generate, page_table, prefix_cache
from paxattn.decode_step import Status
from paxattn.models import Decoder
from paxattn.sampling import SamplingParams
from paxattn.serving import Engine, QueueFull, engine, init_serve, new_request
from paxattn.serving.pace import Pace
from paxattn.serving.placing import settled
from paxattn.serving.stats import Meter

V, P, PAGES, ROWS, PLACES, LONGEST = 257, 4, 32, 4, 12, 32
CONFIG = tiny_config(vocab_size=V, max_positions=LONGEST)
MODEL = Decoder(CONFIG, rngs=nnx.Rngs(0))
# One set of shapes for all tests: twelve prompts of these lengths, at most 16 new tokens each.
LENS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 16]
STOP_IDS = list(range(8))

SIZES = {
    "num_pages": PAGES,
    "page_size": P,
    "max_seqs": ROWS,
    "max_requests": PLACES,
    "max_tokens": LONGEST,
    "step_tokens": 8,
}


def new_state(num_pages=PAGES, budget=8, watermark=0, remember=True, model=MODEL):
    """A server with so many pages for us; somebody else holds the rest."""
    state = init_serve(model, **SIZES, remember=remember)
    others = jnp.arange(PAGES) < PAGES - num_pages
    table = dataclasses.replace(
        state.pool.table, ref_counts=others.astype(jnp.int32), num_free=jnp.int32(num_pages)
    )
    policy = dataclasses.replace(
        state.policy, token_budget=jnp.int32(budget), watermark=jnp.int32(watermark)
    )
    pool = dataclasses.replace(state.pool, table=table)
    return settled(dataclasses.replace(state, pool=pool, policy=policy), model)


PLAIN = {"logits_processor": None, "scrub": False}


def checked(state, num_pages=PAGES):
    """Check the pool's invariants; how many pages are neither free nor cached."""
    table, prefix = state.pool.table, state.pool.prefix
    held = np.zeros(PAGES, int)
    if prefix is not None:
        prefix_cache.check_cache(prefix)
        held = np.asarray(prefix_cache.held(prefix))
    page_table.check_invariants(table, held + (np.arange(PAGES) < PAGES - num_pages))
    return num_pages - int(table.num_free) - held.sum()


@dataclasses.dataclass(frozen=True)
class Asked:
    prompt: list
    new: int
    sampling: SamplingParams
    priority: int = 0
    salt: int = 0

    def request(self, state, arrival):
        return new_request(
            state,
            self.prompt,
            max_new_tokens=self.new,
            arrival=arrival,
            sampling=self.sampling,
            stop_ids=STOP_IDS,
            priority=self.priority,
            salt=self.salt,
        )


def workload(seed, priorities=1):
    """Twelve requests; prompts of a few beginnings, so that they share pages now and then."""
    rng = random.Random(seed)
    stems = [[rng.randrange(V) for _ in range(16)] for _ in range(2)]
    asked = []
    for i, length in enumerate(rng.sample(LENS, len(LENS))):
        prompt = list(rng.choice(stems))[:length]
        prompt[rng.randrange(length) :] = [rng.randrange(V)] * (length - len(prompt) + 1)
        prompt = (prompt + [rng.randrange(V) for _ in range(length)])[:length]
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 2.0]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            frequency_penalty=(0.0, 0.4)[i % 2],
            seed=seed * 100 + i,
        )
        new = 16 if i == 0 else rng.randrange(1, 17)
        asked.append(Asked(prompt, new, sampling, rng.randrange(priorities), rng.randrange(2)))
    return asked


def alone(asked, model=MODEL):
    """What `generate` says, which its own tests hold to one request at a time."""
    found = generate(
        model,
        [one.prompt for one in asked],
        max_new_tokens=[one.new for one in asked],
        sampling=[one.sampling for one in asked],
        stop_token_ids=STOP_IDS,
        page_size=P,
        num_pages=PLACES * LONGEST // P,
        prefix_cache=False,
    )
    return found.completions


def run(state, asked, arrivals, *, num_pages=PAGES, look=lambda state: state, model=MODEL):
    """Put each request at its time, in steps; run until all have ended, and check every step."""
    left = sorted(range(len(asked)), key=lambda i: arrivals[i])
    rank = {i: (-one.priority, i) for i, one in enumerate(asked)}
    before, preempted, clock = {}, set(), 0
    while left or np.any(np.asarray(state.requests.status) == Status.RUNNING):
        while left and arrivals[left[0]] <= clock:
            i = left.pop(0)
            requests = engine._put(state.requests, np.int32(i), asked[i].request(state, i))
            state = dataclasses.replace(state, requests=requests)
        unfinished = np.flatnonzero(np.asarray(state.requests.status) == Status.RUNNING)
        first = min(unfinished, key=rank.get, default=None)
        state = look(engine._serve(model, state, np.int32(1), **PLAIN))
        clock += 1
        status, lens = jax.device_get((state.requests.status, state.requests.num_tokens))
        owners, stored = jax.device_get((state.owners, state.pool.table.kv_lens))
        running = {
            int(owner): int(kv + lens[owner])
            for owner, kv in zip(owners, stored, strict=True)
            if owner < PLACES
        }
        left_rows = {i for i in before.keys() - running.keys() if status[i] == Status.RUNNING}
        preempted |= left_rows
        # Who has to leave comes after all who stay, and the first in rank never stands still.
        assert all(rank[i] > rank[j] for i in left_rows for j in running)
        if first in before and status[first] == Status.RUNNING:
            assert running[first] > before[first]
        before = running
        assert clock < 2000
    assert checked(state, num_pages) == 0  # nothing leaks: all pages are free or cached
    return state, preempted


def outputs(state):
    requests = jax.device_get(state.requests)
    return [
        (line[start:end].tolist(), logprobs[start:end], Status(status).name.lower())
        for line, logprobs, start, end, status in zip(
            requests.tokens,
            requests.logprobs,
            requests.prompt_len,
            requests.num_tokens,
            requests.status,
            strict=True,
        )
    ]


def assert_same(state, expected):
    for (tokens, logprobs, reason), one in zip(outputs(state), expected, strict=True):
        assert tokens == one.tokens
        assert reason == one.finish_reason
        np.testing.assert_allclose(logprobs, one.logprobs, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_outputs_are_those_of_one_request_at_a_time(seed):
    rng = random.Random(seed)
    asked = workload(seed, priorities=1 + 2 * (seed % 2))
    expected = alone(asked)
    pages = [PAGES, 16, 11, 8][seed]
    state = new_state(pages, budget=rng.choice([4, 6, 8]), watermark=rng.randrange(3))
    arrivals = sorted(rng.randrange(30) for _ in asked)
    state, preempted = run(state, asked, arrivals, num_pages=pages)
    assert_same(state, expected)
    assert (int(state.preemptions) > 0) == bool(preempted) == (pages < PAGES)


def test_every_request_but_the_first_in_rank_can_be_preempted_and_nothing_is_lost():
    # Each newcomer comes before all others.
    asked = [dataclasses.replace(one, new=16, priority=i) for i, one in enumerate(workload(5))]
    expected = alone(asked)
    state, preempted = run(new_state(8), asked, [2 * i for i in range(PLACES)], num_pages=8)
    assert_same(state, expected)
    assert len(preempted) > 6
    assert PLACES - 1 not in preempted


def poisoned(state):
    """The state with NaN in all free pages."""
    table = state.pool.table
    free = np.arange(PAGES) >= int(table.num_free)
    pages = np.where(free, PAGES, np.asarray(table.free_pages))
    cache = jax.tree.map(lambda pool: pool.at[:, pages].set(jnp.nan, mode="drop"), state.pool.cache)
    return dataclasses.replace(state, pool=dataclasses.replace(state.pool, cache=cache))


def test_free_pages_never_reach_a_request():
    asked = workload(6)
    expected = alone(asked)
    state, preempted = run(poisoned(new_state(9)), asked, [0] * PLACES, num_pages=9, look=poisoned)
    assert preempted
    assert_same(state, expected)


@pytest.mark.parametrize(("salts", "at_once"), [([0] * 4, 4), ([0, 1, 0, 1], 1)])
def test_requests_that_begin_alike_run_at_once_where_alone_each_fills_the_pool(salts, at_once):
    stem = workload(7)[0].prompt * 16
    asked = [
        Asked([*stem[:16], 100 + i], 4, SamplingParams(seed=i), salt=salt)
        for i, salt in enumerate(salts)
    ]
    most = 0

    def count(state):
        nonlocal most
        most = max(most, int(jnp.sum(state.owners < PLACES)))
        return state

    # They come together: five pages each, of which four hold the same tokens.
    state, _ = run(new_state(8), asked, [0] * 4, num_pages=8, look=count)
    one_by_one, _ = run(new_state(), asked, [0, 30, 60, 90])
    for (tokens, *_), (expected, *_) in zip(outputs(state), outputs(one_by_one), strict=True):
        assert tokens == expected
    assert most == at_once
    assert int(state.preemptions) == 0  # pages that were promised were there


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 40))
def test_many_workloads(seed):
    rng = random.Random(seed)
    asked = workload(seed, priorities=rng.choice([1, 3]))
    pages = rng.choice([8, 9, 12, 16, PAGES])
    state = new_state(pages, rng.choice([4, 5, 8]), rng.randrange(4), remember=seed % 3 > 0)
    arrivals = [rng.randrange(rng.choice([1, 100])) for _ in asked]
    state, _ = run(state, asked, arrivals, num_pages=pages)
    assert_same(state, alone(asked))


def test_a_request_that_can_never_fit_ends_and_lets_others_run():
    asked = workload(8)
    state, _ = run(new_state(5), asked, [0] * PLACES, num_pages=5)
    for (tokens, _, reason), one, want in zip(outputs(state), alone(asked), asked, strict=True):
        fits = len(want.prompt) + len(one.tokens) - 1 <= 5 * P
        assert reason == (one.finish_reason if fits else "out_of_pages")
        assert tokens == one.tokens[: len(tokens)]
        assert len(tokens) == len(one.tokens) or not fits


# The host's side.


def new_engine(num_pages=PAGES, **options):
    made = Engine(MODEL, **SIZES, steps_per_read=5, **options)
    made._state = new_state(num_pages)
    return made


def options_of(one):
    return {
        "max_new_tokens": one.new,
        "sampling": one.sampling,
        "stop_token_ids": STOP_IDS,
        "priority": one.priority,
        "salt": one.salt,
    }


def test_engine_hands_over_what_generate_gives():
    asked = workload(9, priorities=2)
    served = new_engine(8)
    got = [[] for _ in asked]
    for i, one in enumerate(asked):
        assert served.add_request(one.prompt, **options_of(one)) == i
        if i % 3 == 2:
            for delta in served.step():
                got[delta.index].append(delta)
    while served.num_unfinished:
        for delta in served.step():
            got[delta.index].append(delta)
    for deltas, one in zip(got, alone(asked), strict=True):
        assert [token for delta in deltas for token in delta.tokens] == one.tokens
        assert [delta.finish_reason for delta in deltas][-1] == one.finish_reason
        assert all(delta.finish_reason is None for delta in deltas[:-1])
    stats = served.stats
    assert (stats.running, stats.waiting, stats.pages_in_rows) == (0, 0, 0)
    assert stats.preemptions > 0
    assert checked(served._state, 8) == 0


def test_engine_generates_any_number_of_prompts_beside_others():
    asked = workload(10)
    greedy = {"max_new_tokens": 6}
    prompts = [one.prompt for one in asked]
    whole = generate(MODEL, prompts, page_size=P, num_pages=96, prefix_cache=False, **greedy)
    expected = [one.tokens for one in whole.completions]
    served = new_engine(16)
    early = served.add_request(prompts[3], **greedy)
    found = served.generate(prompts * 2, **greedy)
    assert [one.tokens for one in found] == expected * 2
    assert [one.prompt_tokens for one in found] == prompts * 2
    news = []
    while served.num_unfinished:
        news += served.step()
    assert {delta.index for delta in news} == {early}
    assert [token for delta in news for token in delta.tokens] == expected[3]
    assert served.stats.cached_tokens > 0  # half of the prompts were there before


def test_engine_queue_full_and_abort():
    asked = workload(11)
    expected = alone(asked)
    served = new_engine(12)
    for one in asked:
        served.add_request(one.prompt, **options_of(one))
    with pytest.raises(QueueFull, match="1 places needed, 0 of 12 free"):
        served.add_request([1], max_new_tokens=1)
    got = {i: [] for i in range(PLACES + 1)}
    for delta in served.step():
        got[delta.index].append(delta)
    alive = [i for i in got if not got[i] or got[i][-1].finish_reason is None]
    gone = {alive[0], alive[-2]}  # one that runs, one that waits (13 is not there yet)
    assert all(served.abort(i) for i in gone)
    assert not any(served.abort(i) for i in gone)
    assert served.add_request(asked[2].prompt, **options_of(asked[2])) == PLACES
    while served.num_unfinished:
        for delta in served.step():
            got[delta.index].append(delta)
    for i, deltas in got.items():
        one = expected[2 if i == PLACES else i]
        tokens = [token for delta in deltas for token in delta.tokens]
        assert deltas[-1].finish_reason == ("abort" if i in gone else one.finish_reason)
        assert tokens == one.tokens[: len(tokens)]
        assert i in gone or tokens == one.tokens
    assert checked(served._state, 12) == 0


def test_engine_finds_stop_strings():
    tokenizer = Tokenizer(WordLevel({f"w{i:03}": i for i in range(V)}, unk_token="w000"))
    prompt = workload(12)[0].prompt
    (whole,) = new_engine(tokenizer=tokenizer).generate([prompt], max_new_tokens=16)
    assert whole.text.split() == [f"w{token:03}" for token in whole.tokens]
    stop = f"w{whole.tokens[6]:03}"
    at = whole.text.split().index(stop)
    served = new_engine(tokenizer=tokenizer)
    (found,) = served.generate([prompt], max_new_tokens=16, stop=[stop])
    assert (found.finish_reason, found.tokens) == ("stop", whole.tokens[: at + 1])
    assert found.text.split() == whole.text.split()[:at]
    assert served.stats.running == 0


def test_samples_share_their_prompt():
    one = dataclasses.replace(workload(13)[0], prompt=list(range(50, 66)), new=9)
    drawn = {"temperature": 2.0, "top_p": 0.9}
    params = [SamplingParams(**drawn, seed=seed % 2**32) for seed in (2**32 - 1, 2**32, 2**32 + 1)]
    expected = alone([dataclasses.replace(one, sampling=params[i % 3]) for i in range(PLACES)])[:3]
    assert len({tuple(each.tokens) for each in expected}) == 3
    served = new_engine()
    options = {**options_of(one), "sampling": params[0], "num_samples": 3}
    beside = {"max_new_tokens": 4, "num_samples": 2}
    assert served.add_request([1, 2], **beside) == 0
    found = served.generate([one.prompt], **options)
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert [each.finish_reason for each in found] == [each.finish_reason for each in expected]
    assert served.stats.cached_tokens == 2 * 15  # all but the last token, which must be computed
    assert [each.cached_tokens for each in found] == [0, 15, 15]
    assert served.add_request([1, 2], **beside) == 5
    ends = [delta.index for delta in served.drain() if delta.finish_reason]
    assert set(ends) | {0, 1} == {0, 1, 5, 6}
    # The one that stores the prompt may go away.
    options = {**options, "stop_token_ids": ()}
    first = served.add_request([7, *one.prompt[1:]], **options)
    assert served.stats.waiting == 3
    assert served.abort(first)
    tokens = {first: 0, first + 1: 0, first + 2: 0}
    for delta in served.drain():
        tokens[delta.index] += len(delta.tokens)
    assert list(tokens.values()) == [0, 9, 9]
    with pytest.raises(QueueFull, match="13 places needed, 12 of 12 free"):
        served.submit(served.prepare([[1]] * 13, max_new_tokens=1))
    assert served.num_unfinished == 0


def test_the_likeliest_tokens_are_told_to_who_asks():
    one = dataclasses.replace(workload(9)[0], prompt=list(range(60, 66)), new=9)
    options = {**options_of(one), "stop_token_ids": (), "sampling": SamplingParams()}
    served = new_engine()
    first = served.add_request(one.prompt, **options, top_logprobs=3)
    other = served.add_request(one.prompt[1:], **options)
    news = {first: [], other: []}
    for delta in served.drain():
        news[delta.index].append(delta)
    assert not any(delta.top_logprobs for delta in news[other])
    told = [top for delta in news[first] for top in delta.top_logprobs]
    tokens = [token for delta in news[first] for token in delta.tokens]
    assert len(told) == len(tokens) == 9
    prefill, decoded, _ = teacher_forced(MODEL, [one.prompt], [tokens[:-1]])
    for top, logits in zip(told, [prefill[-1], *decoded[:, 0]], strict=True):
        expected = np.asarray(jax.nn.log_softmax(logits))
        best = np.argsort(-expected)[:3]
        assert [token for token, _ in top] == best.tolist()
        np.testing.assert_allclose([value for _, value in top], expected[best], atol=1e-4)
    found = served.generate([one.prompt], **options, top_logprobs=2)[0]
    fewer = [[token for token, _ in top] for top in found.top_logprobs]
    assert fewer == [[token for token, _ in top[:2]] for top in told]
    with pytest.raises(ValueError, match="top_logprobs=21 must be at least 0, and at most 20"):
        served.add_request([1], top_logprobs=21)


def test_engine_stats():
    served = new_engine()
    before = served.stats
    assert (before.generated_tokens, before.tokens_per_second, before.finished) == (0, 0.0, {})
    prompt = list(range(50, 66))
    options = {"max_new_tokens": 8, "stop_token_ids": ()}
    served.generate([prompt], **options)
    gone = [served.add_request(prompt, **options) for _ in range(6)][-1]
    served.abort(gone)
    seen = [served.stats]
    while served.num_unfinished:
        served.step()
        seen.append(served.stats)
        owners = served.state.owners
        assert (owners < served.max_requests).sum() == seen[-1].running
    assert max(stats.waiting for stats in seen) == 5  # before the first block
    assert max(stats.running for stats in seen) == ROWS
    assert max(stats.pages_shared for stats in seen) == 3
    assert all(stats.pages_shared <= stats.pages_in_rows for stats in seen)
    stats = seen[-1]
    assert stats.finished == {"length": 6, "abort": 1}
    assert (stats.prompt_tokens, stats.generated_tokens) == (6 * 16, 6 * 8)
    assert (stats.looked_up_tokens, stats.cached_tokens) == (6 * 16, 5 * 15)
    assert stats.prefix_hit_rate == 75 / 96
    assert stats.time_to_first_token.count == 6
    at_first = 6 * 8 - stats.inter_token_latency.count  # handed over with the first token or as it
    assert 6 <= at_first < 48
    assert stats.inter_token_latency.total > 0
    assert stats.tokens_per_second > 0
    assert (stats.running, stats.waiting, stats.pages_in_rows, stats.utilization) == (0, 0, 0, 1)
    assert stats.pages_cached > 0


def test_counters_of_the_device_may_wrap():
    meter = Meter()
    assert meter.block(0.0, 1.0, 5, {"num_steps": 2**31 - 2}) == 2**31 - 2
    assert meter.block(1.0, 2.0, 5, {"num_steps": -(2**31) + 2}) == 4
    assert meter.device["num_steps"] == 2**31 + 2
    assert meter.generated == 10


def test_blocks_are_as_long_as_fits():
    pace = Pace(64)
    assert [pace.steps(storing) for storing in (True, False)] == [1, 1]
    pace.took(True, 1, 30.0)  # compiled
    assert pace.steps(True) == 1
    pace.took(True, 1, 0.05)
    assert (pace.steps(True), pace.steps(False)) == (2, 1)
    pace.took(False, 1, 0.01)
    assert (pace.steps(True), pace.steps(False)) == (2, 10)
    pace.took(False, 10, 1.0)  # something came in between
    assert pace.steps(False) == 1
    for _ in range(30):
        pace.took(False, 1, 0.0001)
    assert pace.steps(False) == 64
    pace.took(False, 0, 1.0)  # nothing ran
    assert pace.steps(False) == 64


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        (
            [1] * 20,
            {"max_new_tokens": 13},
            ValueError,
            "max_new_tokens=13 must be from 0 to 12: .* prompt has 20",
        ),
        ([1] * 20, {"max_new_tokens": 10}, ValueError, "need 8 pages, the pool has 7"),
        ([], {}, ValueError, "^the prompt has no tokens"),
        ([V], {}, ValueError, "token id 257"),
        ("text", {}, ValueError, "pass tokenizer="),
        ([1], {"max_new_tokens": -1}, ValueError, "max_new_tokens=-1"),
        ([1], {"max_new_tokens": 1.5}, TypeError, "must be an integer"),
        ([1], {"stop_token_ids": range(9)}, ValueError, "at most 8"),
        ([1], {"stop_token_ids": [V]}, ValueError, "stop_token_ids has 257"),
        ([1], {"priority": 2**31}, ValueError, "priority=2147483648"),
        ([1], {"salt": 2**31}, ValueError, "salt=2147483648"),
        ([1], {"sampling": SamplingParams(top_p=0)}, ValueError, "top_p=0"),
        ([1], {"stop": ["x"]}, ValueError, "needs tokenizer="),
        ([1], {"sampling": {"seed": 1}}, TypeError, "must be a SamplingParams"),
        ([1], {"num_samples": 13}, ValueError, "num_samples=13 must be .* at most 12"),
        ([1], {"tempo": 1}, TypeError, "no option 'tempo' of a request: there are max_new_tokens"),
    ],
)
def test_engine_refuses_at_once(prompt, options, error, message):
    served = Engine(MODEL, **{**SIZES, "num_pages": 7})
    with pytest.raises(error, match=message):
        served.add_request(prompt, **{"max_new_tokens": 8, **options})
    assert served.num_unfinished == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_tokens": 33}, "more than the model's 32 positions"),
        ({"step_tokens": 3}, "must be at least max_seqs=4"),
        ({"max_requests": 3}, "must be at least max_seqs=4"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"steps_per_read": 0}, "steps_per_read=0"),
    ],
)
def test_engine_refuses_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        Engine(MODEL, **{**SIZES, **sizes})


@pytest.mark.slow
def test_steps_work_in_place():
    state = init_serve(MODEL, **{**SIZES, "num_pages": 4099})
    compiled = engine._serve.lower(MODEL, state, np.int32(1), **PLAIN).compile()
    pages = state.pool.cache.k_pages
    shape = f"f32[{','.join(map(str, pages.shape))}]"
    lines = [line for line in compiled.as_text().splitlines() if f"= {shape}" in line]
    assert lines
    assert not [line for line in lines if " copy(" in line]
    assert compiled.memory_analysis().temp_size_in_bytes < pages.nbytes


def test_the_counter_of_steps_may_wrap_while_requests_run():
    served = new_engine()
    use = dataclasses.replace(served.state.use, num_steps=jnp.int32(2**31 - 3))
    served._state = settled(dataclasses.replace(served.state, use=use), MODEL)
    (found,) = served.generate([[1, 2, 3]], max_new_tokens=9)
    assert len(found.tokens) == 9
    assert int(served.state.use.num_steps) < 0


def test_a_server_is_warmed_up_before_there_are_requests():
    served = new_engine()
    served.add_request([1, 2, 3], max_new_tokens=9)
    with pytest.raises(RuntimeError, match="1 requests are not finished: warm_up"):
        served.warm_up()
    assert sum(len(delta.tokens) for delta in served.drain()) == 9


@pytest.mark.slow
def test_with_a_fixed_split_outputs_are_the_same_to_the_bit():
    """In steps of the same shapes, alone or with others."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), fixed_split=64)
    engine = Engine(
        model, num_pages=64, page_size=4, max_seqs=4, max_requests=8, max_tokens=32, step_tokens=8,
        steps_per_read=5, prefix_cache=False,
    )  # fmt: skip
    prompts = [[5, 6], [7, 8], [9, 10], [11, 12]]
    alone = [engine.generate([prompt], max_new_tokens=24)[0] for prompt in prompts]
    together = engine.generate(prompts[::-1], max_new_tokens=24)[::-1]
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_array_equal(np.float32(one.logprobs), np.float32(other.logprobs))
