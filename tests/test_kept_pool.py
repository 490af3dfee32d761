"""Prompts that share pages, within one call of `generate` and across calls with a `KeptPool`."""

import dataclasses
import random
import re
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_config

from paxattn import DraftModel, KeptPool, NGram, generate, loops, page_table, prefix_cache, stream
from paxattn.kv_cache import KVCache
from paxattn.models import Decoder
from paxattn.packing import shared_beginnings
from paxattn.prefix_cache.chains import prefix_hashes
from paxattn.sampling import SamplingParams

V, P, PAGES = 257, 4, 64
CONFIG = tiny_config(vocab_size=V, max_positions=80)
MODEL = Decoder(CONFIG, rngs=nnx.Rngs(0))
RNG = np.random.default_rng(0)


def words(*lens):
    found = [RNG.integers(0, V, n).tolist() for n in lens]
    return found if len(found) > 1 else found[0]


# The second shares six pages with the first, the third seven with the second, the last nothing.
SYSTEM = words(26)
PROMPTS = [SYSTEM + words(4), (start := SYSTEM + words(5)) + words(2), start + words(1), words(50)]
SHARED = 24 + 28
LENS = [len(prompt) for prompt in PROMPTS]
SAMPLING = [SamplingParams(temperature=1.5, seed=i) for i in range(4)]
# One set of shapes for most tests, so that they share what is compiled: 4 prompts of 129 to 192
# tokens in all, the longest of 49 to 64.
SHAPE = {"max_new_tokens": 8, "prefill_chunk": 12}
SAMPLED = {**SHAPE, "sampling": SAMPLING}
PLAIN = {"page_size": P, "num_pages": PAGES, "prefix_cache": False}


def tokens_of(generation):
    return [c.tokens for c in generation.completions]


def new_pool(num_pages=PAGES):
    """A pool with so many pages for us; somebody else holds the rest."""
    kept = KeptPool(MODEL, num_pages=PAGES, page_size=P)
    pool = kept.take(max_pages_per_seq=1, salts=np.zeros(1, np.int32))
    others = jnp.arange(PAGES) < PAGES - num_pages
    table = dataclasses.replace(
        pool.table, ref_counts=others.astype(jnp.int32), num_free=jnp.int32(num_pages)
    )
    kept.put_back(dataclasses.replace(pool, table=table), scrub=False)
    return kept


def checked(kept, num_pages=PAGES):
    """Check a pool that nobody uses: all pages are free but those in the cache, how many."""
    pool = kept._pool
    prefix_cache.check_cache(pool.prefix)
    held = np.asarray(prefix_cache.held(pool.prefix))
    assert int(pool.table.num_free) == num_pages - held.sum()
    others = np.arange(PAGES) < PAGES - num_pages
    page_table.check_invariants(pool.table, held + others)
    return int(held.sum())


@pytest.fixture(scope="module")
def plain():
    return generate(MODEL, PROMPTS, **PLAIN, **SAMPLED)


def common(a, b):
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


# Within one call.


def test_shared_beginnings_are_the_longest_runs_of_whole_pages():
    rng = random.Random(0)
    for _ in range(30):
        prompts = [[rng.randrange(2) for _ in range(rng.randrange(1, 14))] for _ in range(8)]
        owners = [rng.choice([0, 0, 5, None]) for _ in prompts]
        for i, (source, count) in enumerate(shared_beginnings(prompts, owners, 3)):
            runs = [
                common(prompts[i][:-1], prompts[j][:-1]) // 3 * 3
                for j in range(i)
                if owners[j] == owners[i] is not None
            ]
            assert count == max(runs, default=0)
            if count:
                first = next(j for j in range(i) if owners[j] == owners[i]
                             and common(prompts[i][:-1], prompts[j][:-1]) >= count)  # fmt: skip
                assert source == first


def test_prompts_of_one_call_share_what_they_begin_with(plain):
    shared = generate(MODEL, PROMPTS, **{**PLAIN, "prefix_cache": True}, **SAMPLED)
    assert tokens_of(shared) == tokens_of(plain)
    assert (plain.stats.cached_tokens, shared.stats.cached_tokens) == (0, SHARED)
    assert plain.stats.prompt_tokens == shared.stats.prompt_tokens == sum(LENS)
    # Six pages are held once for three rows, a seventh once for two.
    assert shared.stats.peak_pages == plain.stats.peak_pages - 2 * 6 - 1
    assert shared.stats.num_steps < plain.stats.num_steps


def test_a_prompt_that_does_not_run_keeps_nobody_waiting(plain):
    options = {**PLAIN, **SAMPLED, "prefix_cache": True, "max_new_tokens": [0, 8, 8, 8]}
    out = generate(MODEL, PROMPTS, **options)
    assert tokens_of(out) == [[], *tokens_of(plain)[1:]]
    assert out.stats.cached_tokens == 28


@pytest.mark.variants
def test_a_prompt_that_finds_no_page_keeps_nobody_waiting():
    # The second waits for the first, which ends for want of pages half way.
    long = words(50)
    prompts = [long, [*long[:40], 1, 2], words(40), [*long[:9], 5]]
    whole = tokens_of(generate(MODEL, prompts, **PLAIN, **SAMPLED))
    ended = set()
    for num_pages in (8, 10, 12, 18):
        kept = new_pool(num_pages)
        tight = generate(MODEL, prompts, prefix_cache=kept, **SAMPLED)
        checked(kept, num_pages)
        for i, (c, tokens) in enumerate(zip(tight.completions, whole, strict=True)):
            assert c.tokens == tokens[: len(c.tokens)]
            ended |= {i} if c.finish_reason == "out_of_pages" and not c.tokens else set()
    assert ended == {0, 1, 2}


# Across calls.


def test_later_calls_start_from_what_earlier_ones_left(plain):
    kept = new_pool()
    first = generate(MODEL, PROMPTS, prefix_cache=kept, **SAMPLED)
    assert tokens_of(first) == tokens_of(plain)
    assert first.stats.cached_tokens == SHARED
    assert (kept.stats.lookups, kept.stats.hits) == (4, 0)
    assert checked(kept) == kept.stats.pages_inserted > 0
    again = generate(MODEL, PROMPTS, prefix_cache=kept, **SAMPLED)
    assert tokens_of(again) == tokens_of(plain)
    np.testing.assert_allclose(
        [c.logprobs for c in again.completions],
        [c.logprobs for c in plain.completions],
        atol=1e-5,
    )
    # All but the last token of each is there.
    assert again.stats.cached_tokens == sum(LENS) - 4 == kept.stats.tokens_saved
    # A conversation goes on: its own reply is found, too, but for what fills no page.
    said = [c.prompt_tokens + c.tokens for c in again.completions]
    more = generate(MODEL, [[*one, 5, 6] for one in said], prefix_cache=kept, **SAMPLED)
    assert more.stats.cached_tokens == sum((len(one) - 1) // P * P for one in said)
    assert kept.stats.hits == 8
    checked(kept)


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if "backend_compile" in event else None
)


def test_other_prompts_hits_and_salts_compile_nothing():
    kept = new_pool()
    for _ in range(2):
        generate(MODEL, PROMPTS, prefix_cache=kept, **SAMPLED)
    before = len(COMPILED)
    others = words(33, 64, 15, 20)
    generate(MODEL, others, prefix_cache=kept, salt=[1, 2, 1, 3], **SAMPLED)
    generate(MODEL, [*PROMPTS[1:], others[0]], prefix_cache=kept, **SAMPLED)
    assert len(COMPILED) == before > 0
    assert kept.stats.hits == 7


@pytest.mark.parametrize(
    "what",
    [
        "samples and guesses",
        pytest.param("model", marks=pytest.mark.slow),
        pytest.param("beams", marks=pytest.mark.slow),
    ],
)
@pytest.mark.variants
def test_samples_beams_and_speculation_are_the_same_with_it(what):
    draft = Decoder(CONFIG, rngs=nnx.Rngs(1))
    options = {
        "samples and guesses": {"num_samples": 2, "draft": NGram(num_tokens=3), **SAMPLED},
        "model": {"draft": DraftModel(model=draft, num_tokens=3), **SAMPLED},
        "beams": {"num_beams": 3, "num_return_sequences": 3, **SHAPE},
    }[what]
    each = {"samples and guesses": 2, "model": 1, "beams": 3}[what]
    # Prompts that repeat themselves, so that looking them up succeeds now and then.
    prompts = [(prompt[:7] * 8)[:n] for prompt, n in zip(PROMPTS, LENS, strict=True)]
    if what == "beams":
        expected = tokens_of(generate(MODEL, prompts, **PLAIN, **options))
    else:
        expected = [[] for _ in range(4 * each)]
        for j in range(each):
            sampling = [dataclasses.replace(one, seed=one.seed + j) for one in SAMPLING]
            alone = generate(MODEL, prompts, **PLAIN, **SHAPE, sampling=sampling)
            expected[j::each] = tokens_of(alone)
    kept = new_pool()
    for saved in (0, sum(LENS) - 4):
        found = generate(MODEL, prompts, prefix_cache=kept, **options)
        assert tokens_of(found) == expected
        assert kept.stats.tokens_saved == saved
        checked(kept)
    # The pages hold what the cache says: who goes on from a completion finds it.
    said = [p + t for p, t in zip(prompts, expected[::each], strict=True)]
    whole = generate(MODEL, said, **PLAIN, **SAMPLED)
    found = generate(MODEL, said, prefix_cache=kept, **SAMPLED)
    assert tokens_of(found) == tokens_of(whole)
    assert found.stats.cached_tokens == sum((len(one) - 1) // P * P for one in said)


def test_a_request_never_fails_for_want_of_pages_that_only_the_cache_holds():
    kept = new_pool(num_pages=48)  # enough for one call, and no more
    for _ in range(4):
        prompts = words(*LENS)
        found = generate(MODEL, prompts, prefix_cache=kept, **SAMPLED)
        assert {c.finish_reason for c in found.completions} == {"length"}
        assert tokens_of(found) == tokens_of(generate(MODEL, prompts, **PLAIN, **SAMPLED))
        checked(kept, 48)
    assert kept.stats.pages_evicted > 80


# Nothing reaches another request.


def watch(monkeypatch, look):
    def spied(run, *args, **options):
        state = run(*args, **options)
        return look(state) or state

    for name in ("start", "go_on", "stop_rows"):
        monkeypatch.setattr(loops, name, partial(spied, getattr(loops, name)))


def poisoned(pool, salts):
    """NaN wherever nobody with these salts has a token: others', free and unwritten slots."""
    prefix = pool.prefix
    known = np.asarray(prefix_cache.held(prefix)) & np.isin(prefix.salts, salts)
    owned = known[:, None].repeat(P, axis=1) > 0
    for pages, length in zip(pool.table.block_tables, pool.table.kv_lens, strict=True):
        for token in range(int(length)):
            owned[pages[token // P], token % P] = True
    mine = owned[None, :, None, :, None]
    cache = KVCache(
        k_pages=jnp.where(mine, pool.cache.k_pages, jnp.nan),
        v_pages=jnp.where(mine, pool.cache.v_pages, jnp.nan),
    )
    return dataclasses.replace(pool, cache=cache)


def test_a_released_page_never_reaches_another_request(monkeypatch):
    """What a tenant does not own is NaN, at every step of calls that take each other's pages."""
    calls = [(PROMPTS, [0, 0, 1, 1]), (words(*LENS), [2] * 4), (PROMPTS, [3] * 4)]
    calls += calls[-1:]  # which finds its own
    outcomes, counts = [], []
    for poisoning in (False, True):
        kept = new_pool(num_pages=50)
        outcomes.append([])
        for prompts, salts in calls:
            with monkeypatch.context() as patch:
                if poisoning:
                    kept._pool = poisoned(kept._pool, salts)
                    watch(patch, lambda state, salts=salts: dataclasses.replace(
                        state, pool=poisoned(state.pool, salts)))  # fmt: skip
                deltas = list(stream(MODEL, prompts, prefix_cache=kept, salt=salts, **SAMPLED))
            outcomes[-1].append([(d.index, d.tokens, d.logprobs, d.finish_reason) for d in deltas])
        counts.append(kept.stats)
    assert outcomes[0] == outcomes[1]
    assert counts[0] == counts[1]
    assert counts[0].tokens_saved == sum(LENS) - 4
    # More pages were filled than there are: they changed hands.
    assert counts[0].pages_inserted > 100 > 2 * counts[0].pages_evicted - 100 > 0


@pytest.mark.slow
def test_with_scrub_nothing_is_left_in_pages_that_nobody_holds(monkeypatch):
    dirty = []

    def look(state):
        pool = state.pool
        free = np.asarray(pool.table.free_pages[: int(pool.table.num_free)])
        dirty.append(np.count_nonzero(np.asarray(pool.cache.k_pages)[:, free]))

    watch(monkeypatch, look)
    kept = new_pool(num_pages=48)
    for scrub in (True, False):
        for prompts in (PROMPTS, words(*LENS), PROMPTS):
            found = list(stream(MODEL, prompts, prefix_cache=kept, scrub=scrub, **SAMPLED))
            assert {d.finish_reason for d in found} == {None, "length"}
        assert kept.stats.pages_evicted > 10
        assert any(dirty) != scrub


def colliding_pages():
    """Two pages of tokens with the same 32 bits of hash, found by trying."""
    tokens = np.random.default_rng(0).integers(0, V, (400_000, 1, P)).astype(np.int32)
    hashes = np.asarray(jax.jit(jax.vmap(prefix_hashes, (0, None)))(tokens, np.int32(0))[:, 1])
    order = np.argsort(hashes, kind="stable")
    return next(
        (tokens[a].ravel().tolist(), tokens[b].ravel().tolist())
        for a, b in pairwise(order)
        if hashes[a] == hashes[b] and tokens[a, 0, 0] != tokens[b, 0, 0]
    )


def test_prompts_of_equal_hash_do_not_share():
    one, two = colliding_pages()
    rest = words(30)
    kept = new_pool()
    generate(MODEL, [one + rest, *words(50, 30, 30)], prefix_cache=kept, **SAMPLED)
    prompts = [two + rest, one + rest, *words(50, 30)]
    found = generate(MODEL, prompts, prefix_cache=kept, **SAMPLED)
    assert tokens_of(found) == tokens_of(generate(MODEL, prompts, **PLAIN, **SAMPLED))
    assert kept.stats.tokens_saved == found.stats.cached_tokens == len(one + rest) - 1


def test_salts_isolate_both_ways():
    kept = new_pool()
    twice = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    limits = {**SAMPLED, "max_new_tokens": [8, 8, 8, 0]}
    first = generate(MODEL, twice, prefix_cache=kept, salt=[1, -2, 1, 1], **limits)
    assert first.stats.cached_tokens == 24  # the third begins like the first, not the second
    saved = kept.stats.tokens_saved
    # The second prompt begins with 26 of the first one's tokens.
    for salt, hits in ((3, 0), (1, 29 + 32), (-2, 29 + 26), (0, 0)):
        prompts = [PROMPTS[0], PROMPTS[1], *words(20, 50)]
        limits["max_new_tokens"] = [8, 8, 0, 0]
        found = generate(MODEL, prompts, prefix_cache=kept, salt=salt, **limits)
        assert kept.stats.tokens_saved - saved == hits
        saved = kept.stats.tokens_saved
        assert tokens_of(found)[0] == tokens_of(first)[0]


# Who has the pool.


def test_one_call_at_a_time_and_the_pool_comes_back_in_any_case(plain):
    kept = new_pool()
    running = stream(MODEL, PROMPTS, prefix_cache=kept, **SAMPLED)
    generate(MODEL, PROMPTS, prefix_cache=kept, **SAMPLED)  # the stream has not begun
    next(running)
    with pytest.raises(RuntimeError, match="prefix_cache= is in use by another stream"):
        generate(MODEL, PROMPTS, prefix_cache=kept, **SAMPLED)
    with pytest.raises(RuntimeError, match="let the stream that has it end, or close it"):
        kept.clear()
    running.close()
    checked(kept)
    assert kept.stats.lookups == 8

    def wrong(logits, num_generated):
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        generate(MODEL, PROMPTS, prefix_cache=kept, logits_processor=wrong, **SAMPLED)
    checked(kept)
    assert kept.stats.lookups == 12
    # An error in the middle of a step leaves nothing to go on with: the next call starts anew.
    running = stream(MODEL, PROMPTS, prefix_cache=kept, **SAMPLED)
    next(running)
    lost = running._news.gi_frame.f_locals["state"].pool
    jax.tree.map(lambda x: x.delete(), lost)
    running.close()
    assert kept.stats.lookups == 0
    found = generate(MODEL, PROMPTS, prefix_cache=kept, **SAMPLED)
    assert tokens_of(found) == tokens_of(plain)
    assert kept.stats.lookups == 4
    kept.clear()
    assert kept.stats.lookups == kept.stats.pages_inserted == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prefix_cache": 1}, TypeError, "prefix_cache=1 must be True, False or a KeptPool"),
        ({"page_size": 8}, ValueError, "page_size=8, but the KeptPool has 4: leave page_size= out"),
        ({"num_pages": 9}, ValueError, "num_pages=9, but the KeptPool has 64"),
        ({"salt": "a"}, TypeError, "salt='a' must be an integer, or one for each prompt"),
        ({"salt": [2**31]}, ValueError, "salt=2147483648 of prompts[0] must be an int32"),
        ({"salt": [1, 2]}, ValueError, "salt has 2 entries for 1 prompts"),
        ({"prefix_cache": KeptPool(Decoder(CONFIG, rngs=nnx.Rngs(0)), num_pages=9)}, ValueError,
         "the KeptPool was made for another model"),
    ],
)  # fmt: skip
def test_bad_input(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        generate(MODEL, [[1]], **{"prefix_cache": new_pool(), **SHAPE, **options})


def test_sizes_of_a_pool_are_checked():
    with pytest.raises(ValueError, match="num_pages=0 must be"):
        KeptPool(MODEL, num_pages=0)
    with pytest.raises(ValueError, match="page_size=257 must be between 1 and 256"):
        KeptPool(MODEL, num_pages=1, page_size=257)


# A trace.


def conversations(seed, count, turns):
    """What each call asks: in every turn, pairs of conversations say something new."""
    rng = random.Random(seed)
    return [
        [(i, [rng.randrange(V) for _ in range(rng.randrange(2, 7))]) for i in pair]
        for _ in range(turns)
        for pair in np.array(rng.sample(range(count), count)).reshape(-1, 2).tolist()
    ]


def run_trace(kept, asked, system):
    """Tokens saved per call, and the most that could be: by comparing with everything before."""
    history, known, saved, best, total = {}, [], [], [], 0
    for call in asked:
        prompts = []
        for i, new in call:
            history[i] = history.get(i, system[i % len(system)]) + new
            prompts.append(history[i])
        # Two more that do not run keep all calls in the same buckets.
        fillers = [[0] * 64, [0] * max(68 - sum(map(len, prompts)), 1)]
        limits = [5, 5, 0, 0]
        out = generate(
            MODEL, prompts + fillers, prefix_cache=kept, **{**SHAPE, "max_new_tokens": limits}
        )
        saved.append(out.stats.cached_tokens)
        total += sum(map(len, prompts))
        best.append(0)
        for k, prompt in enumerate(prompts):
            runs = [common(prompt[:-1], other) for other in known]
            runs += [common(prompt[:-1], other[:-1]) // P * P for other in prompts[:k]]
            best[-1] += max(runs, default=0)
        for (i, _), done in zip(call, out.completions, strict=False):
            assert done.finish_reason == "length"
            history[i] = history[i] + done.tokens
            stored = history[i][:-1]
            known.append(stored[: len(stored) // P * P])
    return saved, best, total


def test_a_trace_of_conversations_reaches_the_best_hit_rate_and_degrades_smoothly():
    asked, system = conversations(0, count=4, turns=4), [words(10), words(13)]
    totals = []
    for size in (64, 44, 38, 34, 30, 27):
        kept = new_pool(size)
        saved, best, total = run_trace(kept, asked, system)
        checked(kept, size)
        totals.append(sum(saved))
        if size == 64:
            assert saved == best
            assert sum(best) > 0.5 * total
            assert kept.stats.pages_evicted == 0
    assert kept.stats.pages_evicted > 0
    lost = [(a - b) / totals[0] for a, b in pairwise(totals)]
    assert min(lost) >= 0
    assert 0 < max(lost) < 0.3
