"""Generation end to end on a tiny random decoder: batches, buckets, stops, pressure, poison."""

import dataclasses
import re
import types
from functools import partial
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_steps import teacher_forced
from tiny import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from paxattn import loops, page_table
from paxattn.generate import generate, stream
from paxattn.kv_cache import KVCache, init_kv_cache
from paxattn.models import Checkpoint, Decoder, DecoderConfig
from paxattn.models.checkpoint import GenerationConfig
from paxattn.ngram import NGram
from paxattn.requests import prepare_requests
from paxattn.sampling import SamplingParams
from paxattn.speculative import DraftModel
from paxattn.step import call_model, logits_of, new_cache

V = 257
CONFIG = DecoderConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
)
MODEL = Decoder(CONFIG, rngs=nnx.Rngs(0))
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, V, n).tolist() for n in (5, 1, 9, 16)]
SAMPLING = [SamplingParams(temperature=2.0, top_p=0.95, seed=40 + i) for i in range(4)]
# One set of shapes for most tests, so that they share what is compiled.
SHAPE = {"page_size": 4, "num_pages": 48, "max_new_tokens": 12}
TIGHT = {**SHAPE, "num_pages": 3}


def tokens_of(generation):
    return [completion.tokens for completion in generation.completions]


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


TOKENIZER = byte_tokenizer()


def watch(monkeypatch, look):
    """Have ``look`` see, or replace, every state that the loop gets back from the device."""
    module = loops

    def spied(run, *args, **options):
        state = run(*args, **options)
        return look(state) or state

    for name in ("start", "go_on", "stop_rows"):
        monkeypatch.setattr(module, name, partial(spied, getattr(module, name)))


@pytest.fixture(scope="module")
def greedy():
    return generate(MODEL, PROMPTS, **SHAPE)


@pytest.fixture(scope="module")
def sampled():
    return generate(MODEL, PROMPTS, sampling=SAMPLING, **SHAPE)


def test_batch_equals_one_at_a_time(sampled):
    alone = generate(MODEL, PROMPTS[2:3], sampling=SAMPLING[2], **SHAPE)
    assert tokens_of(alone) == tokens_of(sampled)[2:3]
    # The same in other company, in another row (and in shapes that are compiled already).
    order = [3, 0, 2, 1]
    others = generate(
        MODEL, [PROMPTS[i] for i in order], sampling=[SAMPLING[i] for i in order], **SHAPE
    )
    assert tokens_of(others) == [tokens_of(sampled)[i] for i in order]


def test_stream_is_generate(sampled):
    for steps in (1, 5):
        running = stream(MODEL, PROMPTS, steps_per_read=steps, sampling=SAMPLING, **SHAPE)
        got = [[] for _ in PROMPTS]
        ended = {}
        for delta in running:
            got[delta.index] += delta.tokens
            if delta.finish_reason:
                assert delta.index not in ended
                ended[delta.index] = delta.finish_reason
        assert got == tokens_of(sampled)
        assert ended == dict.fromkeys(range(4), "length")
        assert running.stats() == sampled.stats


def test_prefill_in_small_chunks_gives_the_same(sampled):
    chunked = generate(MODEL, PROMPTS, sampling=SAMPLING, prefill_chunk=3, **SHAPE)
    assert tokens_of(chunked) == tokens_of(sampled)


@pytest.mark.variants
@pytest.mark.parametrize("page_size", [1, pytest.param(256, marks=pytest.mark.slow)])
def test_page_size_does_not_matter(sampled, page_size):
    other = generate(MODEL, PROMPTS, sampling=SAMPLING, page_size=page_size, max_new_tokens=12)
    assert tokens_of(other) == tokens_of(sampled)


def test_logprobs_are_those_of_the_sequence(sampled):
    tokens = np.array(tokens_of(sampled))
    prefill, decoded, _ = teacher_forced(MODEL, PROMPTS, tokens[:, :-1])
    first = prefill[np.cumsum([len(prompt) for prompt in PROMPTS]) - 1]
    expected = jax.nn.log_softmax(np.concatenate([first[None], decoded]).swapaxes(0, 1))
    found = [completion.logprobs for completion in sampled.completions]
    np.testing.assert_allclose(
        found, np.take_along_axis(np.asarray(expected), tokens[..., None], 2)[..., 0], atol=1e-5
    )
    assert (tokens != np.argmax(expected, axis=-1)).any()


class Poisoned(Decoder):
    """A decoder whose pool starts out full of NaN."""

    def init_cache(self, **sizes):
        cache = super().init_cache(**sizes)
        nan = jnp.full_like(cache.k_pages, jnp.nan)
        return KVCache(k_pages=nan, v_pages=nan)


def test_a_poisoned_pool_changes_no_bit(sampled, monkeypatch):
    # The prompts are stored in such a pool; what decodes after that is compiled already.
    poisoned = Poisoned(CONFIG, rngs=nnx.Rngs(0))
    start = loops.start
    monkeypatch.setattr(loops, "start", lambda _, *args, **kw: start(poisoned, *args, **kw))
    assert generate(MODEL, PROMPTS, sampling=SAMPLING, **SHAPE) == sampled


def test_a_poisoned_rest_of_the_pool_changes_no_bit_at_any_step(monkeypatch):
    # 3 pages: rows end for want of pages, and what they give back is used by the others.
    expected = generate(MODEL, PROMPTS, **TIGHT)
    free, reused = set(), set()

    def poison(state):
        owned = np.zeros((3, 4), bool)
        table, cache = state.pool.table, state.pool.cache
        for pages, length in zip(table.block_tables, table.kv_lens, strict=True):
            for token in range(int(length)):
                owned[pages[token // 4], token % 4] = True
        held = set(np.flatnonzero(owned.any(axis=1)).tolist())
        reused.update(free & held)
        free.update(set(range(3)) - held if state.num_generated.any() else ())
        owned = owned[None, :, None, :, None]
        cache = KVCache(
            k_pages=jnp.where(owned, cache.k_pages, jnp.nan),
            v_pages=jnp.where(owned, cache.v_pages, jnp.nan),
        )
        return dataclasses.replace(state, pool=dataclasses.replace(state.pool, cache=cache))

    watch(monkeypatch, poison)
    tokens = [[] for _ in PROMPTS]
    for delta in stream(MODEL, PROMPTS, **TIGHT):
        tokens[delta.index] += delta.tokens
    assert tokens == tokens_of(expected)
    assert reused


def test_all_pages_come_back(monkeypatch):
    held = []

    def look(state):
        page_table.check_invariants(state.pool.table)
        held.append(48 - int(state.pool.table.num_free))

    watch(monkeypatch, look)
    list(stream(MODEL, PROMPTS, steps_per_read=3, **SHAPE))
    assert max(held) > 0
    assert held[-1] == 0


def test_scrub_zeroes_all_that_is_given_back(monkeypatch):
    texts = ["héllo", "x", "def f(x):", "import os"]
    options = {
        **SHAPE,
        "tokenizer": TOKENIZER,
        "sampling": SAMPLING,
        "max_new_tokens": [12, 3, 9, 12],
    }
    plain = generate(MODEL, texts, **options).completions
    options["stop"] = [plain[0].text[:2]]  # so that one row is ended from the host
    plain = generate(MODEL, texts, **options).completions
    left = []

    def look(state):
        table, cache = state.pool.table, state.pool.cache
        free = np.asarray(table.free_pages[: int(table.num_free)])
        for pages in (cache.k_pages, cache.v_pages):
            left.append(np.count_nonzero(np.asarray(pages)[:, free]))
        left.append(len(free))

    watch(monkeypatch, look)
    assert generate(MODEL, texts, scrub=True, **options).completions == plain
    assert [completion.finish_reason for completion in plain].count("stop") >= 1
    assert left[-1] == 48
    assert not any(left[0::3] + left[1::3])
    left.clear()
    generate(MODEL, texts, **options)
    assert all(left[-3:])


def test_the_pool_is_freed_at_the_end_by_closing_and_by_dropping(greedy):
    def pools():
        return sum(x.shape == (2, 48, 2, 4, 8) for x in jax.live_arrays())

    with stream(MODEL, PROMPTS, **SHAPE) as running:
        assert next(running).tokens == tokens_of(greedy)[0][:1]
        assert pools() == 2
    assert pools() == 0
    assert list(running) == []
    assert running.stats().num_steps == 2
    running.close()
    done = stream(MODEL, PROMPTS, **SHAPE)
    assert len(list(done)) > 4
    assert pools() == 0
    assert done.stats() == greedy.stats
    dropped = stream(MODEL, PROMPTS, **SHAPE)
    next(dropped)
    del dropped
    assert pools() == 0


def test_out_of_pages_ends_only_those_affected():
    # The last prompt is larger than the pool. Of the others two lie in a page each, and the second
    # row begins the third page, so that none is left for the third row, whose page is full. What it
    # gives back goes to the first row, and so does the page of the second when that is full.
    prompts = [RNG.integers(0, V, n).tolist() for n in (3, 1, 5, 16)]
    new = [8, 12, 12, 12]
    whole = generate(MODEL, prompts, **{**SHAPE, "max_new_tokens": new})
    tight = generate(MODEL, prompts, **{**TIGHT, "max_new_tokens": new})
    assert tokens_of(tight) == [
        tokens[:n] for tokens, n in zip(tokens_of(whole), (8, 4, 0, 0), strict=True)
    ]
    reasons = [completion.finish_reason for completion in tight.completions]
    assert reasons == ["length", "out_of_pages", "out_of_pages", "out_of_pages"]
    assert tight.stats.peak_pages == 3
    assert whole.stats.peak_pages <= tight.stats.enough_pages


def test_samples_need_no_more_pages_than_they_hold():
    """For want of a page to copy to, the last that shares one waits until it is alone with it."""
    options = {"page_size": 4, "max_new_tokens": 2, "num_samples": 3}
    out = generate(MODEL, [PROMPTS[0][:3]], num_pages=3, **options)
    assert {completion.finish_reason for completion in out.completions} == {"length"}
    assert out.stats.peak_pages == 3


def test_a_prompt_larger_than_the_pool_takes_nothing_from_the_others(greedy):
    order = [3, 0, 2, 1]
    small = generate(MODEL, [PROMPTS[i] for i in order], **TIGHT)
    assert small.completions[0].finish_reason == "out_of_pages"
    assert small.completions[0].tokens == []
    # All but the last tokens of the 5 and the 9 take three pages. Then the row that was 5 long is
    # the first to need another page; the 9 take its page and fill it.
    for completion, i in zip(small.completions, order, strict=True):
        assert completion.tokens == tokens_of(greedy)[i][: {3: 0, 0: 0, 2: 4, 1: 0}[i]]


def test_prefill_tries_again_until_no_row_waits():
    # The first takes all three pages. The others end one after the other, each in a step of its
    # own; then the first goes on to the end of its third page.
    prompts = [RNG.integers(0, V, n).tolist() for n in (9, 8, 8, 1)]
    full = generate(MODEL, prompts, **TIGHT)
    assert [len(completion.tokens) for completion in full.completions] == [4, 0, 0, 0]
    assert {completion.finish_reason for completion in full.completions} == {"out_of_pages"}
    assert full.stats.num_steps == 3 + 4


def test_a_row_that_fails_in_the_middle_of_its_prompt_disturbs_nobody():
    # In chunks of 3 tokens the 12 of the third prompt run out of pages in the middle; the last one
    # takes its page. The first finds none for its first new token, and then there are enough.
    prompts = [RNG.integers(0, V, n).tolist() for n in (9, 1, 12, 4)]
    new = [5, 4, 12, 5]
    whole = generate(MODEL, prompts, **{**SHAPE, "max_new_tokens": new})
    tight = generate(MODEL, prompts, prefill_chunk=3, **{**TIGHT, "max_new_tokens": new})
    assert tokens_of(tight) == [
        tokens[:n] for tokens, n in zip(tokens_of(whole), (0, 4, 0, 5), strict=True)
    ]
    reasons = [completion.finish_reason for completion in tight.completions]
    assert reasons == ["out_of_pages", "length", "out_of_pages", "length"]


def test_max_new_tokens_per_prompt_and_zero(greedy):
    out = generate(MODEL, PROMPTS, **{**SHAPE, "max_new_tokens": [12, 0, 1, 5]})
    assert [len(c.tokens) for c in out.completions] == [12, 0, 1, 5]
    assert [c.finish_reason for c in out.completions] == ["length"] * 4
    for completion, whole in zip(out.completions, tokens_of(greedy), strict=True):
        assert completion.tokens == whole[: len(completion.tokens)]
    nothing = generate(MODEL, PROMPTS, **{**SHAPE, "max_new_tokens": 0})
    assert tokens_of(nothing) == [[], [], [], []]


def test_stop_tokens_end_rows_even_at_the_first_token(greedy):
    first = tokens_of(greedy)[1][0]
    third = tokens_of(greedy)[3][2]
    out = generate(MODEL, PROMPTS, stop_token_ids=[first, third], **SHAPE)
    for completion, whole in zip(out.completions, tokens_of(greedy), strict=True):
        cut = [i for i, token in enumerate(whole) if token in (first, third)]
        expected = whole[: cut[0] + 1] if cut else whole
        assert completion.tokens == expected
        assert completion.finish_reason == ("stop" if cut else "length")
    assert out.completions[1].tokens == [first]


def test_text_in_text_out_and_stop_strings():
    texts = ["héllo", "x", "def f(x):", "import os"]
    options = {**SHAPE, "tokenizer": TOKENIZER, "sampling": SAMPLING}
    plain = generate(MODEL, texts, **options).completions
    assert plain[0].prompt_tokens == TOKENIZER.encode("héllo").ids
    # Bytes of a character that never got finished are left out.
    assert plain[0].text == TOKENIZER.decode(plain[0].tokens).rstrip("\ufffd")
    # Text is made of whole characters, so pick the stop string from what is there.
    whole = max(plain, key=lambda completion: len(completion.text)).text
    middle = whole[2:4]
    expected = [c.text.split(middle)[0] for c in plain]
    cut = generate(MODEL, texts, stop=[middle, "never this"], **options).completions
    assert [c.text for c in cut] == expected
    assert [c.finish_reason == "stop" for c in cut] == [middle in c.text for c in plain]
    assert any(c.finish_reason == "stop" for c in cut)
    for completion, whole in zip(cut, plain, strict=True):
        assert completion.tokens == whole.tokens[: len(completion.tokens)]
        assert len(completion.logprobs) == len(completion.tokens)
        assert TOKENIZER.decode(completion.tokens).startswith(completion.text)
    for steps in (1, 3):
        got = [([], [], "", [])] * 4
        for delta in stream(MODEL, texts, stop=[middle], steps_per_read=steps, **options):
            tokens, logprobs, text, reasons = got[delta.index]
            got[delta.index] = (
                tokens + delta.tokens,
                logprobs + delta.logprobs,
                text + delta.text,
                reasons + [delta.finish_reason] * (delta.finish_reason is not None),
            )
        assert got == [(c.tokens, c.logprobs, c.text, [c.finish_reason]) for c in cut]


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if "backend_compile" in event else None
)


def test_other_lengths_and_parameters_compile_nothing(sampled):
    before = len(COMPILED)
    other = [RNG.integers(0, V, n).tolist() for n in (3, 7, 4, 14)]
    params = [SamplingParams(temperature=0.5 * i, top_k=i, min_p=0.1, seed=i) for i in range(4)]
    generate(MODEL, other, sampling=params, stop_token_ids=[3, 4], **{**SHAPE, "max_new_tokens": 9})
    generate(MODEL, other, **SHAPE)
    assert len(COMPILED) == before
    assert before > 0


def test_repetition_penalty_counts_prompt_and_output():
    out = generate(
        MODEL, PROMPTS, sampling=SamplingParams(repetition_penalty=1e6), **SHAPE
    ).completions
    for completion in out:
        sequence = completion.prompt_tokens[-1:] + completion.tokens
        assert len(set(sequence)) == len(sequence)
        assert not set(completion.tokens) & set(completion.prompt_tokens)
    for name in ("frequency_penalty", "presence_penalty"):
        sampling = SamplingParams(**{name: 1e6})
        for completion in generate(MODEL, PROMPTS, sampling=sampling, **SHAPE).completions:
            assert len(set(completion.tokens)) == len(completion.tokens)


@pytest.mark.parametrize(
    ("prompts", "draft", "scrub"),
    [
        pytest.param(PROMPTS, None, False, id="plain"),
        pytest.param(
            PROMPTS * 2,
            NGram(num_tokens=3, branches=2),
            True,
            id="rows that share, trees of guesses, scrub",
            marks=pytest.mark.variants,
        ),
    ],
)
def test_the_whole_decode_loop_works_in_place(prompts, draft, scrub):
    num_pages = 2**14
    options = {**SHAPE, "num_pages": num_pages, "draft": draft}
    requests = prepare_requests(MODEL, prompts, **options)
    state = jax.eval_shape(
        partial(loops.start, sizes=requests.sizes, scrub=scrub),
        MODEL,
        draft,
        None,
        requests.packed,
        requests.prompt_lens,
        requests.max_new_tokens,
        requests.stop_ids,
        requests.sampling,
    )
    lowered = loops.go_on.lower(
        MODEL, draft, state, np.int32(1), logits_processor=None, scrub=scrub
    )
    memory = lowered.compile().memory_analysis()
    pool = getattr(state, "decode", state).pool.cache.bytes_per_page * num_pages
    assert memory.alias_size_in_bytes > pool
    assert memory.temp_size_in_bytes < pool / 20


def test_logits_processor():
    def never_low(logits, num_generated):
        low = jnp.arange(V) < jnp.where(num_generated[:, None] < 3, 200, 100)
        return jnp.where(low, -jnp.inf, logits)

    for tokens in tokens_of(generate(MODEL, PROMPTS, logits_processor=never_low, **SHAPE)):
        assert min(tokens[:3]) >= 200
        assert min(tokens[3:]) >= 100


def test_stats(greedy):
    stats = greedy.stats
    assert stats.peak_pages == sum(-(-(len(p) + 11) // 4) for p in PROMPTS)
    assert 0.5 < stats.utilization <= 1
    assert stats.naive_utilization < stats.utilization
    assert stats.bytes_per_page == 2 * 2 * 2 * 4 * 8 * 4
    assert generate(MODEL, []).completions == []


BAD = SamplingParams(top_p=2)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        (["text"], {}, ValueError, "prompts[0] is text: pass tokenizer="),
        ("text", {}, TypeError, "prompts must be a list of prompts, not one string"),
        ([[1], []], {}, ValueError, "prompts[1] has no tokens"),
        ([[V]], {}, ValueError, f"prompts[0] has token id {V}: not in the model's 0..{V - 1}"),
        ([[-1]], {}, ValueError, "prompts[0] has token id -1"),
        ([[1]], {"max_new_tokens": -1}, ValueError, "max_new_tokens=-1 of prompts[0]"),
        ([[1]], {"max_new_tokens": [1, 2]}, ValueError, "max_new_tokens has 2 entries for 1 pro"),
        ([[1]], {"sampling": []}, ValueError, "sampling has 0 entries for 1 prompts"),
        ([[1]], {"max_new_tokens": 1, "sampling": BAD}, ValueError, "top_p=2 must be a number in"),
        (
            [[1] * 60],
            {"max_new_tokens": 5},
            ValueError,
            "prompts[0] has 60 tokens and max_new_tokens=5: more than the model's 64 positions",
        ),
        ([[1]], {"max_new_tokens": 8, "prefill_chunk": 0}, ValueError, "prefill_chunk=0 must be"),
        ([[1]], {"max_new_tokens": 8, "stop": ["a"]}, ValueError, "needs tokenizer="),
        ([[1]], {"max_new_tokens": 8, "stop": "a"}, TypeError, "must be a list of strings"),
        ([[1]], {"max_new_tokens": 8, "stop": [""]}, ValueError, "must be a list of non-empty"),
        ([[1]], {"max_new_tokens": 8, "page_size": 0}, ValueError, "page_size"),
        ([[1]], {"max_new_tokens": 8, "num_pages": 0}, ValueError, "num_pages=0 must be"),
        ([[1]], {"max_new_tokens": 8, "num_pages": 2**31}, ValueError, "slots, which are counted"),
        ([[1]], {"temperature": 1}, TypeError, "temperature= is no option: tokenizer, max_new_to"),
        ([[1]], {"max_new_tokens": 8, "logits_processor": 3}, TypeError, "must be a function of"),
        ([[1]], {"max_new_tokens": 8, "scrub": "no"}, TypeError, "scrub='no' must be True or Fa"),
        (None, {}, TypeError, "prompts=None must be a list of prompts"),
        ({"a": [1]}, {}, TypeError, "prompts={'a': [1]} must be a list of prompts"),
        ([{1, 2}], {}, TypeError, "prompts[0] is {1, 2}: must be a sequence of token ids"),
        ([jnp.ones(2)], {}, TypeError, "a token of prompts[0] is 1.0: must be an integer"),
        ([jnp.int32(1)], {}, TypeError, "must be a sequence of token ids"),
        ([[1.5]], {}, TypeError, "a token of prompts[0] is 1.5: must be an integer"),
        ([[1]], {"max_new_tokens": 1.5}, TypeError, "=1.5 must be an integer, or one"),
        ([[1]], {"max_new_tokens": True}, TypeError, "max_new_tokens of prompts[0] is True"),
        ([[1]], {"sampling": [None]}, TypeError, "must be a SamplingParams, or one for each"),
        ([[1]], {"max_new_tokens": 8, "num_pages": 2.0}, TypeError, "num_pages is 2.0"),
        ([[1]], {"max_new_tokens": 8, "stop_token_ids": [1.5]}, TypeError, "of stop_token_ids is"),
        ([[1]], {"max_new_tokens": 8, "stop_token_ids": 3}, TypeError, "stop_token_ids is 3: must"),
        ([[1]], {"max_new_tokens": 8, "steps_per_read": 1.5}, TypeError, "steps_per_read is 1.5"),
        ([[1], None], {}, TypeError, "prompts[1] is None: must be a sequence of token ids"),
        ([b"text"], {}, TypeError, "prompts[0] is b'text': must be a sequence of token ids"),
        (["\udcff"], {"tokenizer": TOKENIZER}, ValueError, "prompts[0] is '\\udcff': no valid"),
        ([[1]], {"tokenizer": TOKENIZER, "stop": ["\udcff"]}, ValueError, "a stop string is"),
        ([[1]], {"tokenizer": TOKENIZER, "stop": [1]}, TypeError, "has 1: must be a list of str"),
        ([[1]], {"tokenizer": "gpt2"}, TypeError, "tokenizer is a str: must be a tokenizers.Token"),
        (
            [[1]],
            {"max_new_tokens": 1, "sampling": SamplingParams(temperature="1")},
            TypeError,
            "temperature='1' must be 0 (greedy) or a positive number",
        ),
        ([[1]], {"max_new_tokens": 8, "steps_per_read": 0}, ValueError, "steps_per_read=0 must be"),
        ([[1]], {"max_new_tokens": 8, "stop_token_ids": [V]}, ValueError, "stop_token_ids"),
    ],
)  # fmt: skip
def test_errors_name_the_request_and_the_figures(prompts, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        list(stream(MODEL, prompts, **options))


CHECKPOINT = Checkpoint(
    model=MODEL,
    config=CONFIG,
    tokenizer=None,
    generation_config=GenerationConfig(),
    directory=Path("somewhere"),
)


@pytest.mark.parametrize("model", [CHECKPOINT, None, nnx.Linear(2, 2, rngs=nnx.Rngs(0))])
def test_what_is_no_model_is_said_to_be_none(model):
    with pytest.raises(TypeError, match=r"^model is a .* without .*: must be a Decoder, such as"):
        generate(model, [[1]])
    with pytest.raises(TypeError, match=r"^draft\.model is a .* without .*: must be a Decoder"):
        generate(MODEL, [[1]], draft=DraftModel(model=model), max_new_tokens=1)


def test_what_a_model_of_ones_own_lacks_is_named():
    class Mine:
        config = types.SimpleNamespace(vocab_size=7)
        logits = init_cache = None

        def __call__(self, tokens, batch, cache):
            return self.hidden(tokens, cache)

    with pytest.raises(TypeError, match=r"^model is a Mine without config.max_positions: must be"):
        generate(Mine(), [[1]])
    mine, tokens = Mine(), jnp.zeros(3, jnp.int32)
    for hidden, got in (
        (lambda tokens, cache: tokens, r"\(3,\)"),
        (lambda tokens, cache: (tokens, cache), r"\(3,\), NoneType"),
        (lambda tokens, cache: (jnp.zeros((2, 4)), cache), r"\(2, 4\), NoneType"),
    ):
        mine.hidden = hidden
        with pytest.raises(TypeError, match=rf"Mine.__call__ must .* 3 tokens, .* returned {got}$"):
            call_model(mine, tokens, None, None)

    class Careless(Mine):
        def logits(self, hidden):
            return hidden

        def init_cache(self, *, num_pages, page_size, dtype=None):
            return init_kv_cache(
                num_layers=1, num_pages=num_pages, page_size=page_size, num_kv_heads=1, head_dim=8
            )

    expected = r"Careless.logits must return .*, here \[3, 7\]; it returned \[3, 4\]$"
    with pytest.raises(TypeError, match=expected):
        logits_of(Careless(), jnp.zeros((3, 4)))
    sizes = dict(num_pages=2, page_size=4)
    assert new_cache(Careless(), **sizes, dtype=None).num_pages == 2
    with pytest.raises(
        TypeError, match=r"Careless.init_cache\(dtype=int8\) made pages of bfloat16"
    ):
        new_cache(Careless(), **sizes, dtype="int8")
    mine.init_cache = lambda **sizes: None
    with pytest.raises(TypeError, match=r"Mine.init_cache must return a KVCache, .* not None"):
        new_cache(mine, **sizes, dtype=None)


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray])
def test_arrays_and_their_numbers_are_as_good_as_lists(to_array, greedy):
    ids = [to_array(prompt) for prompt in PROMPTS]
    numbers = {name: to_array(value) for name, value in SHAPE.items()}
    options = {"salt": to_array([0] * 4), "stop_token_ids": to_array([V - 1])}
    assert tokens_of(generate(MODEL, ids, **numbers, **options)) == tokens_of(greedy)
    numbers["max_new_tokens"] = to_array([12] * 4)
    assert tokens_of(generate(MODEL, ids, **numbers)) == tokens_of(greedy)
    two = prepare_requests(MODEL, to_array([[1, 2], [3, 4]]), max_new_tokens=1)
    assert two.prompts == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda logits, _: logits[:, :3], "logits_processor returned float32[4, 3], must be float"),
        (lambda logits, _: logits.astype(jnp.bfloat16), "logits_processor returned bfloat16[4, "),
        (lambda *_: None, "logits_processor returned NoneType[], must be float32[4, 257] as it"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_a_processor_must_return_logits(processor, message, options):
    message = message.replace("[4, ", "[8, ") if options else message
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(MODEL, PROMPTS, logits_processor=processor, **SHAPE, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"draft": NGram(num_tokens=2)}, marks=pytest.mark.variants),
        pytest.param({"num_samples": 2}, marks=pytest.mark.variants),
    ],
)
def test_loops_trace_with_64_bit_numbers_enabled(options):
    """Sums of counts become int64 then, which no loop may carry."""
    requests = prepare_requests(MODEL, PROMPTS, **SHAPE, **options)
    with jax.enable_x64(True):
        state = jax.eval_shape(
            partial(loops.start, sizes=requests.sizes, scrub=False),
            MODEL, requests.draft, None, requests.packed, requests.prompt_lens,
            requests.max_new_tokens, requests.stop_ids, requests.sampling,
        )  # fmt: skip
        after = jax.eval_shape(
            partial(loops.go_on, logits_processor=None, scrub=False),
            MODEL, requests.draft, state, np.int32(1),
        )  # fmt: skip
    assert {x.dtype.name for x in jax.tree.leaves(after)} <= {"int32", "float32", "bool", "uint32"}


def test_any_number_of_steps_per_read(greedy):
    deltas = list(stream(MODEL, PROMPTS, steps_per_read=2**40, **SHAPE))
    assert [d.tokens for d in deltas if d.tokens] == tokens_of(greedy)


@pytest.mark.parametrize("seed", [np.uint8(255), np.int32(7), np.uint32(2**32 - 1)])
def test_seeds_of_samples_do_not_wrap_in_their_dtype(seed):
    sampling = SamplingParams(temperature=1.0, seed=seed)
    requests = prepare_requests(MODEL, [[1]], max_new_tokens=1, sampling=sampling, num_samples=3)
    wanted = [(int(seed) + j) % 2**32 for j in range(3)]
    assert np.asarray(requests.sampling.seed).tolist() == wanted


def test_more_rows_than_can_be_counted():
    message = (
        "1 prompts with 1000000000 samples (or beams) each take 1000000000 rows, which with 257"
    )
    for options in (dict(num_samples=10**9), dict(num_beams=10**9)):
        with pytest.raises(ValueError, match=re.escape(message)):
            generate(MODEL, [[1]], max_new_tokens=1, **options)
    with pytest.raises(TypeError, match="must be a list of prompts"):
        generate(MODEL, np.array(3), max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_what_fails_on_the_device_is_raised(options):
    """A pool of terabytes. (To read an array of what failed may never return.)"""
    model = Decoder(tiny_config(vocab_size=V, max_positions=8), rngs=nnx.Rngs(0))
    shape = {"max_new_tokens": 1, "num_pages": 10**8, "page_size": 20, "prefix_cache": False}
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            generate(model, [[1]], **shape, **options)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
