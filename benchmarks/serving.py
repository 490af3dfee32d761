"""Continuous batching in pages beside naive reservation, and beside Hugging Face transformers.

    python benchmarks/serving.py [--only promised,conversation,code,latency,throughput]

All with the bundled checkpoint in float32, in the memory in which naive reservation of 2,048 tokens
serves 4 requests at once. Requests are all there at the start; prompts are random tokens, nothing
ends one before its length.

promised, conversation, code: how many run at once, and how full their pages are, of the promised
workload (responses of 500 tokens on average), and of lengths drawn through the percentiles of the
Azure 2023 conversation and code traces (Patel et al., Splitwise, https://arxiv.org/abs/2311.18677),
scaled to the model's 2,048 positions. Naive reservation runs for as many steps as pages take for
all. Writes pictures too, where matplotlib is there.

latency: a step of a server with 8 requests that decode, beside a decode step over dense caches
that reserve 2,048 tokens for each.

throughput: static batches of 4, Hugging Face continuous batching (``generate_batch``'s manager,
``sdpa``, the same weights and pages; where torch is there), and this.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _common import RESULTS, interleaved, save, show
from end_to_end import BATCH, STEPS, dense_decode, timed

from paxattn import bundled, generate, load
from paxattn.sampling import SamplingParams, row_sampling
from paxattn.serving import Engine, ServeState, engine, init_serve, new_request, put, serve

NAIVE, POSITIONS, PAGE, STEP_TOKENS = 4, 2048, 16, 256
PAGES = NAIVE * POSITIONS // PAGE
ROWS = 32
Lengths = list[tuple[int, int]]  # of prompt and response

# Percentiles 50, 90 and 99 of inputs and outputs, in tokens; the traces are cut at the last.
AZURE = {
    "conversation": ([1, 1020, 2735, 4142, 4142], [1, 129, 424, 601, 601]),
    "code": ([1, 1469, 5194, 7436, 7436], [1, 13, 55, 252, 252]),
}


def promised(count: int) -> Lengths:
    rng = np.random.default_rng(0)
    return list(
        zip(rng.integers(8, 64, count).tolist(), rng.integers(50, 951, count).tolist(), strict=True)
    )


def azure(trace: str, count: int) -> Lengths:
    rng = np.random.default_rng(1)
    scale = min(1, (POSITIONS - 2) / sum(points[-1] for points in AZURE[trace]))
    columns = []
    for points in AZURE[trace]:
        drawn = np.interp(rng.random(count), [0, 0.5, 0.9, 0.99, 1], points)
        columns.append(np.maximum(drawn * scale, 1).astype(int).tolist())
    return list(zip(*columns, strict=True))


def prompts_of(lengths: Lengths) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(1, 4096, prompt).tolist() for prompt, _ in lengths]


def new_engine(model: Any, lengths: Lengths, rows: int) -> Engine:
    """An engine with all requests in its queue."""
    made = Engine(
        model,
        num_pages=PAGES,
        page_size=PAGE,
        max_seqs=rows,
        max_requests=128,
        step_tokens=STEP_TOKENS,
        prefix_cache=False,  # what it keeps would count as held
    )
    for ids, (_, new) in zip(prompts_of(lengths), lengths, strict=True):
        made.add_request(ids, max_new_tokens=new)
    return made


@jax.jit
def look(state: ServeState) -> tuple[jax.Array, ...]:
    """Running, waiting, tokens in pages, pages held, tokens ever run."""
    running = jnp.sum(state.owners < state.capacity)
    table = state.pool.table
    unfinished = jnp.sum(state.requests.status == 1)
    held = table.num_pages - table.num_free
    return running, unfinished - running, jnp.sum(table.kv_lens), held, state.use.num_steps


def watch(served: Engine, steps: float = np.inf) -> dict[str, np.ndarray]:
    """Run an engine to its end or for so many steps, looking after every block; by time."""
    seen: list[list[float]] = []
    while served.num_unfinished and not (seen and seen[-1][-1] >= steps):
        served.step()
        seen.append([time.perf_counter(), *jax.device_get(look(served._state))])
    columns = np.array(seen, float).T
    columns[0] -= columns[0][0]
    return dict(
        zip(("time", "running", "waiting", "tokens", "pages", "steps"), columns, strict=True)
    )


def memory(model: Any, name: str, lengths: Lengths) -> None:
    """How many requests run at once while others wait."""
    paged = new_engine(model, lengths, ROWS)
    seen = {"pages": watch(paged)}
    seen["naive"] = watch(new_engine(model, lengths, NAIVE), seen["pages"]["steps"][-1])
    at_once = {}
    for kind, one in seen.items():
        steps = np.diff(one["steps"], prepend=0) * (one["waiting"] > 0)
        if not steps.any():
            raise RuntimeError(f"{len(lengths)} requests do not fill the memory: ask for more")
        at_once[kind] = float(np.average(one["running"], weights=steps))
        if kind == "naive":
            naive_tokens = float(np.average(one["tokens"], weights=steps))
    use = jax.device_get(paged._state.use)
    row = {
        "workload": name,
        "requests": len(lengths),
        "mean_prompt": float(np.mean([prompt for prompt, _ in lengths])),
        "mean_response": float(np.mean([new for _, new in lengths])),
        "naive_at_once": at_once["naive"],
        "pages_at_once": at_once["pages"],
        "times_as_many": at_once["pages"] / at_once["naive"],
        "naive_utilization": naive_tokens / (NAIVE * POSITIONS),
        "utilization": float(use.token_steps / (use.page_steps * PAGE)),
        "preemptions": int(paged._state.preemptions),
    }
    show(f"requests at once in the memory of {NAIVE} x {POSITIONS} tokens", [row])
    save(f"serving_{name}", [row])
    draw(name, seen)


def draw(name: str, seen: dict[str, dict[str, np.ndarray]]) -> None:
    """The picture: against steps, which are alike on every machine."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = ("% of reserved slots filled", "requests running", "requests waiting")
    figure, axes = pyplot.subplots(3, figsize=(6, 7), sharex=True)
    for kind, one in seen.items():
        held = np.where(one["pages"] > 0, one["pages"] * PAGE, np.nan)
        slots = NAIVE * POSITIONS if kind == "naive" else held
        shown = (100 * one["tokens"] / slots, one["running"], one["waiting"])
        for axis, values, label in zip(axes, shown, labels, strict=True):
            axis.plot(one["steps"], values, label=kind)
            axis.set_ylabel(label)
    axes[0].set_title(f"{name}: naive reservation and pages in the same memory")
    axes[0].legend()
    axes[-1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(RESULTS / f"serving_{name}.png", dpi=90)


def latency(model: Any, rounds: int) -> None:
    config = model.config
    run = jax.jit(serve, donate_argnames="state")
    rows = []
    for context in (512, 1024):
        state = init_serve(
            model, num_pages=BATCH * POSITIONS // PAGE, page_size=PAGE, max_seqs=BATCH,
            max_requests=BATCH, max_tokens=POSITIONS, step_tokens=STEP_TOKENS, remember=False,
        )  # fmt: skip
        requests = state.requests
        for i, ids in enumerate(prompts_of([(context, 0)] * BATCH)):
            one = new_request(state, ids, max_new_tokens=POSITIONS - context, arrival=i)
            requests = put(requests, jnp.int32(i), one)
        state = dataclasses.replace(state, requests=requests)
        state = jax.block_until_ready(run(model, state, jnp.int32(context * BATCH // 200)))
        shape = (config.num_layers, BATCH, config.num_kv_heads, POSITIONS, config.head_dim)
        k, v = (jax.random.normal(jax.random.key(i), shape) for i in (1, 2))
        first = jnp.arange(BATCH, dtype=jnp.int32)
        params = row_sampling([SamplingParams()] * BATCH, BATCH)

        def run_dense(k=k, v=v, first=first, params=params, context=context) -> float:
            caches = jax.block_until_ready((k + 0, v + 0))
            lens = jnp.full(BATCH, context, jnp.int32)
            return timed(lambda: dense_decode(model, caches, first, lens, params)[2])[0]

        def run_paged(state=state) -> float:
            own = jax.block_until_ready(jax.tree.map(lambda x: x + 0, state))
            return timed(lambda: run(model, own, jnp.int32(STEPS)).use.num_steps)[0]

        seconds = interleaved({"pages": run_paged, "reserved": run_dense}, rounds)
        paged, dense = (seconds[name]["min"] / STEPS * 1e3 for name in ("pages", "reserved"))
        rows.append(
            {
                "context": context,
                "batch": BATCH,
                "pages_ms_per_token": paged,
                "reserved_ms_per_token": dense,
                "pages_over_reserved": paged / dense,
            }
        )
    show(f"latency per token at equal batch, {POSITIONS} tokens reserved each", rows)
    save("serving_latency", rows)


def run_static(model: Any, lengths: Lengths) -> float:
    """Batches of as many as can reserve their memory, in the order they came."""
    prompts = prompts_of(lengths)
    began = time.perf_counter()
    for start in range(0, len(lengths), NAIVE):
        batch = slice(start, start + NAIVE)
        new = [new for _, new in lengths[batch]]
        generate(model, prompts[batch], max_new_tokens=new, prefix_cache=False)
    return time.perf_counter() - began


def run_here(model: Any, lengths: Lengths, rows: int) -> tuple[float, float]:
    """Seconds, and how many of them the device loop ran."""
    served, inside = new_engine(model, lengths, rows), 0.0
    whole = engine._serve

    def measured(*args: Any, **options: Any) -> ServeState:
        nonlocal inside
        began = time.perf_counter()
        state = jax.block_until_ready(whole(*args, **options))
        inside += time.perf_counter() - began
        return state

    engine._serve = measured
    try:
        began = time.perf_counter()
        while served.num_unfinished:
            served.step()
        return time.perf_counter() - began, inside
    finally:
        engine._serve = whole


def transformers_server(path: Path) -> Callable[[Lengths], float] | None:
    """Hugging Face continuous batching of the same weights in as many pages."""
    try:
        import torch
        import transformers
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
    except ImportError as error:
        print(f"skipped Hugging Face continuous batching: {error}")
        return None
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.set_attn_implementation("sdpa")

    def run(lengths: Lengths) -> float:
        manager = model.init_continuous_batching(
            generation_config=transformers.GenerationConfig(
                do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=POSITIONS
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=32, num_blocks=NAIVE * POSITIONS // 32, max_batch_tokens=512
            ),
        )
        began = time.perf_counter()
        for ids, (_, new) in zip(prompts_of(lengths), lengths, strict=True):
            manager.add_request(ids, max_new_tokens=new)
        manager.start()
        finished = tokens = 0
        while finished < len(lengths):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                finished, tokens = finished + 1, tokens + len(result.generated_tokens)
            elif not manager.is_running():
                raise RuntimeError("the manager's thread ended before the requests")
        took = time.perf_counter() - began
        manager.stop(block=True)
        if tokens != sum(new for _, new in lengths):
            raise RuntimeError(f"{tokens} tokens came of {sum(new for _, new in lengths)}")
        return took

    return run


def throughput(model: Any, path: Path, count: int) -> None:
    """Each once, after a few requests of the same shapes to compile (or warm up)."""
    lengths = promised(count)
    tokens = sum(new for _, new in lengths)
    sides: dict[str, Callable[[Lengths], tuple[float, float | None]]] = {
        "pages, continuous batching": lambda lengths: run_here(model, lengths, min(count, ROWS)),
        f"reserved, static batches of {NAIVE}": lambda lengths: (run_static(model, lengths), None),
    }
    theirs = transformers_server(path)
    if theirs is not None:
        sides["transformers, continuous batching"] = lambda lengths: (theirs(lengths), None)
    seconds, rows = {}, []
    for name, run in sides.items():
        run(lengths[:NAIVE])
        seconds[name], inside = run(lengths)
        print(f"{name}: {seconds[name]:.1f} s")
        rows.append(
            {
                "what": name,
                "requests": count,
                "tokens_per_s": tokens / seconds[name],
                "paxattn_is_faster_by": seconds[name] / seconds["pages, continuous batching"],
                "outside_device_loop": None if inside is None else 1 - inside / seconds[name],
            }
        )
    show(f"throughput, responses of {tokens / count:.0f} tokens on average", rows)
    save("serving_throughput", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="promised,conversation,code,latency,throughput")
    parser.add_argument("--requests", type=int, default=40)
    args = parser.parse_args()
    path = bundled()
    model = load(path, dtype="float32").model
    parts: dict[str, Callable[[], None]] = {
        "promised": lambda: memory(model, "promised", promised(args.requests)),
        **{
            trace: partial(memory, model, trace, azure(trace, args.requests * 3 // 5))
            for trace in AZURE
        },
        "latency": lambda: latency(model, 10),
        "throughput": lambda: throughput(model, Path(path), args.requests // 3),
    }
    for name in args.only.split(","):
        parts[name]()


if __name__ == "__main__":
    main()
