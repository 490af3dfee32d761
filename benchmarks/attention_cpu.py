"""Paged attention (the reference) against dense attention on a CPU: microseconds per layer.

`python benchmarks/attention_cpu.py [--quick]` prints a table and writes results/attention_cpu.json.

decode   one new token in each of 8 rows, 8 stacked layers in a scan, several steps in one jitted
         loop. `dense` keeps a [rows, heads, context, dim] cache per layer, cut to the context, in
         an unrolled loop over layers, with the fastest products found for it: the most favourable
         form there is. `dense, scanned` keeps the layers of the same cache stacked, as a decoder
         with scanned layers must.
prefill  whole prompts at once, causal; `dense` materialises [tokens, tokens] scores.

GB/s counts each stored key and value once per layer. `bandwidth` is what a sum over the same dense
arrays reaches here: the bound of anything that reads them.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from _common import interleaved, machine, save, show
from jax import lax

from paxattn.attention import paged_attention, paged_attention_decode

ROWS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, LAYERS = 8, 8, 4, 64, 16, 8
GROUP = NUM_Q_HEADS // NUM_KV_HEADS


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def loop(attend_all_layers, steps):
    """`steps` decode steps, each fed with the last one's output so that none can be left out."""
    return jax.jit(
        lambda q, *args: lax.fori_loop(0, steps, lambda _, q: attend_all_layers(q, *args), q)
    )


def dot(a, b, contract):
    return lax.dot_general(a, b, ((contract[:1], contract[1:]), ((0, 1), (0, 1))))


def dense_decode(q, k, v, lens):
    """Attention of q [rows, q heads, dim] to k and v [rows, KV heads, context, dim]."""
    heads = (q * HEAD_DIM**-0.5).reshape(ROWS, NUM_KV_HEADS, GROUP, HEAD_DIM)
    # A product of a matrix and a vector per query head: on a CPU that beats one of two matrices.
    s = jnp.concatenate([dot(heads[:, :, g : g + 1], k, (3, 3)) for g in range(GROUP)], axis=2)
    s = jnp.where((jnp.arange(k.shape[2]) < lens[:, None])[:, None, None], s, -jnp.inf)
    return dot(jax.nn.softmax(s), v, (3, 2)).reshape(q.shape)


def decode_cases(context, steps):
    pages = context // PAGE_SIZE
    num_pages = ROWS * pages + 7
    q = draw(ROWS, NUM_Q_HEADS, HEAD_DIM)
    lens = jnp.full(ROWS, context, jnp.int32) - jnp.arange(ROWS, dtype=jnp.int32)
    tables = np.random.default_rng(1).permutation(num_pages)[: ROWS * pages]
    tables = jnp.asarray(tables.reshape(ROWS, pages), jnp.int32)

    def paged(q, k, v):
        def layer(q, i):
            o = paged_attention_decode(q, k, v, block_tables=tables, kv_lens=lens, layer=i)
            return o + 0.1 * q, None

        return lax.scan(layer, q, jnp.arange(LAYERS))[0]

    def dense(q, *layers):
        for k, v in zip(layers[::2], layers[1::2], strict=True):
            q = dense_decode(q, k, v, lens) + 0.1 * q
        return q

    def scanned(q, k, v):
        return lax.scan(lambda q, kv: (dense_decode(q, *kv, lens) + 0.1 * q, None), q, (k, v))[0]

    def bandwidth(q, *layers):
        return q + sum((x + q[0, 0, 0]).sum() for x in layers) * 1e-9

    pool = draw(LAYERS, num_pages, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)
    stacked = draw(LAYERS, ROWS, NUM_KV_HEADS, context, HEAD_DIM)
    apart = [x + 0 for _ in "kv" for x in stacked]
    return {
        "paged": functools.partial(loop(paged, steps), q, pool, pool + 0),
        "dense": functools.partial(loop(dense, steps), q, *apart),
        "dense, scanned": functools.partial(loop(scanned, steps), q, stacked, stacked + 0),
        "bandwidth": functools.partial(loop(bandwidth, steps), q, *apart),
    }


def dense_prefill(q, k, v):
    """All [rows, tokens, heads, dim]."""
    rows, tokens = q.shape[:2]
    by_head = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    heads = by_head(q * HEAD_DIM**-0.5).reshape(rows, NUM_KV_HEADS, GROUP * tokens, HEAD_DIM)
    s = dot(heads, by_head(k), (3, 3)).reshape(rows, NUM_KV_HEADS, GROUP, tokens, tokens)
    s = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), s, -jnp.inf)
    o = dot(jax.nn.softmax(s).reshape(*heads.shape[:3], tokens), by_head(v), (3, 2))
    return by_head(o.reshape(rows, NUM_Q_HEADS, tokens, HEAD_DIM))


def prefill_cases(rows, tokens):
    num_pages = rows * tokens // PAGE_SIZE
    tables = np.random.default_rng(1).permutation(num_pages).reshape(rows, -1).astype(np.int32)
    lens = jnp.full(rows, tokens, jnp.int32)
    starts = jnp.arange(rows + 1, dtype=jnp.int32) * tokens

    def paged(q, k, v):
        return paged_attention(
            q, k, v, block_tables=jnp.asarray(tables), kv_lens=lens, cu_q_lens=starts,
            max_q_len=tokens,
        )  # fmt: skip

    pool = draw(num_pages, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)
    q = draw(rows, tokens, NUM_Q_HEADS, HEAD_DIM)
    k = draw(rows, tokens, NUM_KV_HEADS, HEAD_DIM)
    return {
        "paged": functools.partial(
            jax.jit(paged), q.reshape(rows * tokens, NUM_Q_HEADS, HEAD_DIM), pool, pool + 0
        ),
        "dense": functools.partial(jax.jit(dense_prefill), q, k, k + 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    quick = parser.parse_args().quick
    steps, repeats = (4, 7) if quick else (8, 21)
    rows = []
    for context in (256, 1024) if quick else (128, 256, 512, 1024):
        stored = 2 * ROWS * context * NUM_KV_HEADS * HEAD_DIM * 4
        times = interleaved(decode_cases(context, steps), repeats)
        for name, time in times.items():
            us = {k: time[k] / steps / LAYERS * 1e6 for k in ("median", "low")}
            rows.append(
                {
                    "case": f"decode, context {context}",
                    "form": name,
                    "us per layer": us["median"],
                    "us (low)": us["low"],
                    "GB/s (low)": stored / us["low"] / 1e3,
                    "over dense (low)": time["low"] / times["dense"]["low"],
                }
            )
    for prompts, tokens in ((8, 128), (1, 2048)):
        times = interleaved(prefill_cases(prompts, tokens), repeats)
        for name, time in times.items():
            rows.append(
                {
                    "case": f"prefill, {prompts} x {tokens}",
                    "form": name,
                    "us per layer": time["median"] * 1e6,
                    "us (low)": time["low"] * 1e6,
                    "GB/s (low)": "",
                    "over dense (low)": time["low"] / times["dense"]["low"],
                }
            )
    show(f"attention on a CPU, jax {machine()['jax']}", rows)
    print(save("attention_cpu", rows, steps=steps, repeats=repeats))


if __name__ == "__main__":
    main()
