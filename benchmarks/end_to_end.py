"""Whole `generate` beside Hugging Face transformers, and paged decode beside a dense cache.

    python benchmarks/end_to_end.py [--rounds 5] [--skip-transformers]

Part 1: a random 25M-parameter GQA Llama in float32, batch 8, prompt 128, 128 new tokens, greedy,
the same weights in both libraries, both warmed up, runs interleaved, medians. Needs torch and
transformers; says so when they are missing.

Part 2: the same decoder with a dense ``[batch, heads, max_len, head_dim]`` cache per layer instead
of pages. One decode loop each (allocator, write, attention, sampling) of 64 steps that ends at the
given context; the dense one reserves exactly that length, its best case.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from _common import interleaved, save, show
from flax import nnx
from jax import lax

from paxattn import generate, load, page_table
from paxattn.decode_step import DecodeState, Status, decode
from paxattn.models import Decoder, DecoderConfig
from paxattn.pool import Pool
from paxattn.ragged import RaggedBatch
from paxattn.sampling import SamplingParams, row_sampling, sample
from paxattn.step import no_use

BATCH, PROMPT, NEW = 8, 128, 128
STEPS = 64
LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def beside_transformers(rounds: int) -> list[dict]:
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"skipped the comparison with transformers: {error}")
        return []
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = load(directory, dtype="float32").model
    prompts = np.random.default_rng(0).integers(5, 4096, (BATCH, PROMPT))
    options = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }

    def run_theirs(**more) -> np.ndarray:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)
        return out[:, PROMPT:].numpy()

    def run_ours() -> np.ndarray:
        out = generate(ours, prompts.tolist(), max_new_tokens=NEW)
        return np.array([completion.tokens for completion in out.completions])

    same = (run_ours() == run_theirs()).mean()
    peer = f"transformers {transformers.__version__} with torch {torch.__version__}"
    seconds = interleaved(
        {
            "paxattn": run_ours,
            f"{peer}, dynamic cache": run_theirs,
            f"{peer}, static cache": partial(run_theirs, cache_implementation="static"),
        },
        rounds,
    )
    return [
        {
            "what": name,
            "batch": BATCH,
            "prompt": PROMPT,
            "new_tokens": NEW,
            "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(ours))),
            "tokens_per_s": BATCH * NEW / took["median"],
            "paxattn_is_faster_by": took["median"] / seconds["paxattn"]["median"],
            "same_tokens_as_paxattn": float(same) if "dynamic" in name else None,
        }
        for name, took in seconds.items()
    ]


def dense_attend(q, k, v, cache, batch, *, layer, sliding_window=None):
    """Same contract as `paxattn.nn.attend`, over k, v [layers, batch, heads, max_len, head_dim]."""
    del sliding_window
    rows = jnp.arange(BATCH)
    k_all, v_all = (
        pool.at[layer, rows, :, batch.positions].set(new)
        for pool, new in zip(cache, (k, v), strict=True)
    )
    keys, values = k_all[layer], v_all[layer]
    heads, head_dim = keys.shape[1], keys.shape[3]
    grouped = q.reshape(BATCH, heads, -1, head_dim) * head_dim**-0.5
    scores = jnp.einsum("bhgd,bhtd->bhgt", grouped, keys)
    seen = jnp.arange(keys.shape[2]) < batch.kv_lens[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bhgt,bhtd->bhgd", weights, values)
    return out.reshape(q.shape), (k_all, v_all)


@partial(jax.jit, donate_argnames=("cache",))
def dense_decode(model, cache, tokens, lens, params):
    """STEPS greedy steps from ``lens`` tokens on."""

    def body(i, carry):
        cache, tokens, out = carry
        batch = RaggedBatch(
            block_tables=jnp.zeros((BATCH, 1), jnp.int32),
            kv_lens=lens + i + 1,
            cu_q_lens=jnp.arange(BATCH + 1, dtype=jnp.int32),
            rows=jnp.arange(BATCH, dtype=jnp.int32),
            positions=lens + i,
            slots=jnp.zeros(BATCH, jnp.int32),
            max_q_len=1,
            num_pages=1,
            page_size=1,
        )
        hidden, cache = model(tokens, batch, cache, attend=dense_attend)
        tokens, _ = sample(model.logits(hidden), params, lens * 0 + i)
        return cache, tokens, out.at[i].set(tokens)

    out = jnp.zeros((STEPS, BATCH), jnp.int32)
    return lax.fori_loop(0, STEPS, body, (cache, tokens, out))


def timed(run):
    """Seconds and result of a call whose inputs were made before the clock started."""
    started = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - started, np.asarray(result)


paged_decode = jax.jit(decode, donate_argnames=("state",))


def beside_dense(rounds: int) -> list[dict]:
    config = DecoderConfig(
        vocab_size=LLAMA["vocab_size"],
        hidden_size=LLAMA["hidden_size"],
        intermediate_size=LLAMA["intermediate_size"],
        num_layers=LLAMA["num_hidden_layers"],
        num_heads=LLAMA["num_attention_heads"],
        num_kv_heads=LLAMA["num_key_value_heads"],
        head_dim=64,
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    params = row_sampling([SamplingParams()] * BATCH, BATCH)
    rows = []
    for context in (256, 512, 1024):
        start = jnp.full(BATCH, context - STEPS, jnp.int32)
        shape = (config.num_layers, BATCH, config.num_kv_heads, context, config.head_dim)
        k, v = (jax.random.normal(jax.random.key(i), shape) for i in (1, 2))
        first = jnp.arange(BATCH, dtype=jnp.int32)

        def run_dense(k=k, v=v, first=first, start=start):
            caches = jax.block_until_ready((k + 0, v + 0))
            return timed(lambda: dense_decode(model, caches, first, start, params)[2].T)

        def run_paged(k=k, v=v, first=first, start=start):
            state = jax.block_until_ready(paged_state(model, k, v, first, start, params))
            steps = jnp.int32(STEPS)
            return timed(lambda: paged_decode(model, state, steps).tokens[:, :STEPS])

        np.testing.assert_array_equal(run_dense()[1], run_paged()[1])
        seconds = interleaved(
            {"paged": lambda run=run_paged: run()[0], "dense": lambda run=run_dense: run()[0]},
            rounds,
        )
        paged, dense = (seconds[name]["median"] / STEPS * 1e3 for name in ("paged", "dense"))
        rows.append(
            {
                "context": context,
                "batch": BATCH,
                "paged_ms_per_step": paged,
                "dense_ms_per_step": dense,
                "paged_over_dense": paged / dense,
            }
        )
    return rows


def paged_state(model, k, v, first, start, params, page_size=16) -> DecodeState:
    """A state whose rows hold what the dense caches hold, in pages in random order."""
    context = k.shape[3]
    per_row = context // page_size
    num_pages = BATCH * per_row
    empty = page_table.init_page_table(
        num_pages=num_pages, page_size=page_size, max_seqs=BATCH, max_pages_per_seq=per_row
    )
    shuffled = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    held, ok, _ = page_table.reserve(
        dataclasses.replace(empty, free_pages=jnp.asarray(shuffled)),
        start,
        max_new_pages=per_row,
    )
    held, appended = page_table.append(held, start)
    if not (bool(ok.all()) and bool(appended.all())):
        raise RuntimeError("the pool is too small")
    cache = model.init_cache(num_pages=num_pages, page_size=page_size)

    def paged(dense, pool):
        pages = dense.reshape(*dense.shape[:3], per_row, page_size, -1)
        pages = jnp.moveaxis(pages, 3, 2)  # [layers, batch, pages, heads, page_size, head_dim]
        return pool.at[:, held.block_tables].set(pages, mode="drop")

    return DecodeState(
        pool=Pool(
            table=held,
            cache=type(cache)(k_pages=paged(k, cache.k_pages), v_pages=paged(v, cache.v_pages)),
            prefix=None,
            salts=jnp.zeros(BATCH, jnp.int32),
        ),
        status=jnp.full(BATCH, int(Status.RUNNING), jnp.int32),
        last_token=first + 0,
        num_generated=jnp.zeros(BATCH, jnp.int32),
        max_new_tokens=jnp.full(BATCH, STEPS, jnp.int32),
        stop_ids=jnp.full((BATCH, 8), -1, jnp.int32),
        sampling=jax.tree.map(lambda x: x + 0, params),
        counts=jnp.zeros((BATCH, LLAMA["vocab_size"]), jnp.int32),
        tokens=jnp.zeros((BATCH, STEPS), jnp.int32),
        logprobs=jnp.zeros((BATCH, STEPS), jnp.float32),
        use=no_use(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-transformers", action="store_true")
    args = parser.parse_args()
    dense = beside_dense(args.rounds)
    show("paged decode beside a dense cache", dense)
    peers = [] if args.skip_transformers else beside_transformers(args.rounds)
    if peers:
        show("generate beside transformers", peers)
    save("end_to_end", dense, transformers=peers)


if __name__ == "__main__":
    main()
