"""What sharing saves: prompts computed once, pages held once, guesses looked up, a trace of chats.

    python benchmarks/prefix_cache.py [prompts | overhead | pages | guesses | trace] [--rounds 7]

With the bundled checkpoint in float32; each part writes results/prefix_cache_PART.json.

prompts   10 and 100 requests of 200 common and 20 own tokens, to their first token: every prompt
          for itself, sharing within the call, and from a pool that has the 200 tokens already.
          `of ideal`: the part of the time saved over the part of the prompt tokens saved by whole
          pages, were nothing else to do.
overhead  10 requests that share nothing, 220 tokens and 32 new ones: the same three, end to end.
          The pool that is kept is full of others' pages and evicts.
pages     pages held by samples and beams of a prompt of 200 tokens after 64 more, beside those of
          separate requests, and of the least that any sharing of full prompt pages needs.
guesses   a function from the standard library, once more, and again from its first line on: greedy
          with and without lookup of n-grams.
trace     conversations that take turns under two system prompts, in pools of several sizes: prompt
          tokens found, beside the most that could be, had nothing ever been evicted.

Runs take turns; times are medians.
"""

from __future__ import annotations

import argparse
import inspect
import random
import textwrap
from dataclasses import replace
from statistics import quantiles

import jax.numpy as jnp
import numpy as np
from _common import interleaved, machine, save, show

from paxattn import KeptPool, NGram, SamplingParams, bundled, generate, load

CHECKPOINT = load(bundled(), dtype="float32")
MODEL, TOKENIZER = CHECKPOINT.model, CHECKPOINT.tokenizer
VOCAB, PAGE = MODEL.config.vocab_size, 16
RNG = np.random.default_rng(0)


def words(n: int) -> list[int]:
    return RNG.integers(1, VOCAB, n).tolist()


def median(times: dict[str, float]) -> float:
    return times["median"]


def prompts(rounds: int) -> list[dict]:
    rows = []
    common = words(200)
    for count in (10, 100):
        # Just enough: a call that makes its own pool fills it with zeros first.
        options = {"max_new_tokens": 1, "prefill_chunk": 128, "num_pages": 14 * count}
        kept = KeptPool(MODEL, num_pages=14 * count)
        saved: dict[str, float] = {}

        def run(name, prefix_cache, count=count, options=options, saved=saved):
            asked = [common + words(20) for _ in range(count)]
            stats = generate(MODEL, asked, prefix_cache=prefix_cache, **options).stats
            saved[name] = stats.cached_tokens / stats.prompt_tokens

        ways = {"alone": False, "in the call": True, "kept": kept}
        for _ in range(2):  # the second time, the kept pool has the common tokens
            run("kept", kept)
        took = interleaved(
            {name: lambda name=name, way=way: run(name, way) for name, way in ways.items()}, rounds
        )
        alone = median(took["alone"])
        rows += [
            {
                "requests": count,
                "way": name,
                "ms": median(took[name]) * 1e3,
                "tokens saved": saved[name],
                "time saved": 1 - median(took[name]) / alone,
                "of ideal": (1 - median(took[name]) / alone) / saved[name] if saved[name] else "",
            }
            for name in ways
        ]
    return rows


def overhead(rounds: int) -> list[dict]:
    kept = KeptPool(MODEL, num_pages=512)
    options = {"max_new_tokens": 32, "num_pages": 512}

    def run(way):
        stats = generate(MODEL, [words(220) for _ in range(10)], prefix_cache=way, **options).stats
        if stats.cached_tokens > 10:
            raise RuntimeError(f"{stats.cached_tokens} tokens were found, but none should be")

    for _ in range(4):
        run(kept)
    ways = {"alone": False, "in the call": True, "kept": kept}
    took = interleaved({name: lambda way=way: run(way) for name, way in ways.items()}, rounds)
    return [
        {
            "way": name,
            "ms": median(took[name]) * 1e3,
            "over alone": median(took[name]) / median(took["alone"]),
            "best over best": took[name]["min"] / took["alone"]["min"],
            "pages evicted": kept.stats.pages_evicted if name == "kept" else 0,
        }
        for name in ways
    ]


def pages(_: int) -> list[dict]:
    prompt, new, rows = words(200), 64, []
    separate = -(-(len(prompt) + new - 1) // PAGE)
    shared = (len(prompt) - 1) // PAGE
    for what, count in (
        ("samples", 4),
        ("samples", 8),
        ("samples", 16),
        ("beams", 4),
        ("beams", 8),
    ):
        options = {"max_new_tokens": new}
        if what == "samples":
            options |= {"num_samples": count, "sampling": SamplingParams(temperature=1.0)}
        else:
            options["num_beams"] = count
        held = generate(MODEL, [prompt], **options).stats.peak_pages
        least = shared + count * (separate - shared)
        rows.append(
            {
                "what": what,
                "count": count,
                "pages": held,
                "over exact sharing": held / least,
                "over separate requests": held / (count * separate),
            }
        )
    return rows


def guesses(rounds: int) -> list[dict]:
    functions = (textwrap.indent, textwrap.dedent, inspect.getmodulename, quantiles)
    rows = []
    for function in functions:
        source = inspect.getsource(function)
        text = f"{source}\n\n{source}\n\n{source.splitlines()[0]}\n"
        ids = TOKENIZER.encode(text).ids
        options = {"max_new_tokens": min(128, 2000 - len(ids)), "num_pages": 160}

        def run(draft, ids=ids, options=options):
            return generate(MODEL, [ids], draft=draft, **options)

        ways = {"plain": None, "ngram": NGram(num_tokens=4)}
        out = {name: run(way) for name, way in ways.items()}
        took = interleaved({name: lambda way=way: run(way) for name, way in ways.items()}, rounds)
        stats = out["ngram"].stats
        tokens = {name: found.completions[0].tokens for name, found in out.items()}
        rows.append(
            {
                "function": function.__name__,
                "prompt": len(ids),
                "acceptance": stats.accepted / max(stats.drafted, 1),
                "steps": stats.num_steps / out["plain"].stats.num_steps,
                "time": median(took["ngram"]) / median(took["plain"]),
                "same tokens": tokens["plain"] == tokens["ngram"],
            }
        )
    return rows


def trace(_: int) -> list[dict]:
    rng = random.Random(0)
    count, turns, size = 12, 6, 1024
    calls = [
        [(i, words(rng.randrange(10, 60))) for i in pair]
        for _ in range(turns)
        for pair in np.array(rng.sample(range(count), count)).reshape(-1, 2).tolist()
    ]
    systems = [words(120), words(200)]
    rows = []
    for free in (1024, 320, 256, 192, 160, 128, 96):
        found, best, asked, kept = one_trace(calls, systems, free, size)
        rows.append(
            {
                "pages": free,
                "hit rate": found / asked,
                "of the best possible": found / best,
                "pages evicted": kept.stats.pages_evicted,
            }
        )
    return rows


def one_trace(calls, systems, free, size):
    """Tokens found, the most that could be, tokens asked, and the pool after it."""
    kept = KeptPool(MODEL, num_pages=size)
    pool = kept.take(max_pages_per_seq=1, salts=np.zeros(1, np.int32))
    others = (jnp.arange(size) < size - free).astype(jnp.int32)  # somebody else's pages
    table = replace(pool.table, ref_counts=others, num_free=jnp.int32(free))
    kept.put_back(replace(pool, table=table), scrub=False)
    history, known, found, best, asked = {}, [], 0, 0, 0
    for call in calls:
        texts = []
        for i, new in call:
            history[i] = history.get(i, systems[i % 2]) + new
            texts.append(history[i])
        # Prompts that do not run keep all calls in the same buckets, so that little is compiled.
        left = 1900 - 600 - sum(map(len, texts))
        fillers = [[0] * 600, [0] * (left // 2), [0] * (left - left // 2)]
        out = generate(
            MODEL, texts + fillers, prefix_cache=kept, max_new_tokens=[16, 16, 0, 0, 0],
            prefill_chunk=128,
        )  # fmt: skip
        found += out.stats.cached_tokens
        asked += sum(map(len, texts))
        for k, text in enumerate(texts):
            runs = [common_run(text[:-1], other) for other in known]
            runs += [common_run(text[:-1], other[:-1]) // PAGE * PAGE for other in texts[:k]]
            best += max(runs, default=0)
        for (i, _), done in zip(call, out.completions, strict=False):
            history[i] = history[i] + done.tokens
            stored = history[i][:-1]
            known.append(stored[: len(stored) // PAGE * PAGE])
    return found, best, asked, kept


def common_run(a, b):
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


PARTS = {f.__name__: f for f in (prompts, overhead, pages, guesses, trace)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all by default")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for name in args.parts or PARTS:
        rows = PARTS[name](args.rounds)
        show(f"{name}, {machine()}", rows)
        print(f"wrote {save(f'prefix_cache_{name}', rows, page_size=PAGE)}")


if __name__ == "__main__":
    main()
