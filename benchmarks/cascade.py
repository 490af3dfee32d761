"""Attention of rows that share a prefix, on a CPU: read once for all, against once for each.

`python benchmarks/cascade.py [--quick]` prints a table and writes results/cascade.json.

One decode step: 8 to 64 rows with one new token each hold the same 512 or 2,048 tokens, in the same
pages, and 128 tokens of their own; GQA 8/2, head_dim 64, pages of 16, float32, 8 layers.

shared    `paged_attention` with `shared=`, found in the step: once for all its layers.
plain     the same without: every row reads all of its pages.
suffixes  plain, on the rows' own 128 tokens only (in a block table of the same shape).
dense     attention of all queries to the shared tokens alone, as dense keys and values: two matrix
          products and the softmax between them, each layer's arrays apart, none of them paged.
unshared  `paged_attention` with `shared=` on rows with nothing in common, 128 tokens each: next to
          `suffixes` it tells what looking costs.

The aim is shared <= 1.3 x (suffixes + dense).
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from _common import interleaved, machine, save, show
from jax import lax

from paxattn.attention import paged_attention
from paxattn.shared_prefix import find_shared_prefix

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, LAYERS, SUFFIX = 8, 2, 64, 16, 8, 128


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def forms(rows, shared_tokens):
    """One function per form, a decode step of all layers each."""
    common, own = shared_tokens // PAGE_SIZE, SUFFIX // PAGE_SIZE
    num_pages = common + rows * own
    pages = np.random.default_rng(1).permutation(num_pages).astype(np.int32)
    prefix, suffixes = pages[:common], pages[common:].reshape(rows, own)
    whole = np.concatenate([np.tile(prefix, (rows, 1)), suffixes], axis=1)
    alone = np.pad(suffixes, ((0, 0), (0, common)), constant_values=num_pages)
    cu = jnp.arange(rows + 1, dtype=jnp.int32)
    q = draw(rows, NUM_Q_HEADS, HEAD_DIM)
    pool = draw(LAYERS, num_pages, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)

    def over_layers(attend, q):
        return lax.scan(lambda q, i: (attend(q, i) + 0.1 * q, None), q, jnp.arange(LAYERS))[0]

    def paged(look, q, k, v, tables, lens):
        shared = None
        if look:
            shared = find_shared_prefix(
                tables, lens, cu, num_tokens=rows, page_size=PAGE_SIZE, num_pages=num_pages
            )
        call = functools.partial(
            paged_attention, k_pages=k, v_pages=v, block_tables=tables, kv_lens=lens,
            cu_q_lens=cu, max_q_len=1, shared=shared,
        )  # fmt: skip
        return over_layers(lambda q, i: call(q, layer=i), q)

    def dense(q, *layers):
        dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
        for k, v in zip(layers[::2], layers[1::2], strict=True):
            heads = (q * HEAD_DIM**-0.5).reshape(rows, NUM_KV_HEADS, -1, HEAD_DIM)
            heads = jnp.swapaxes(heads, 0, 1).reshape(NUM_KV_HEADS, -1, HEAD_DIM)
            p = jax.nn.softmax(dot(heads, k, (((2,), (2,)), ((0,), (0,)))))
            o = dot(p, v, (((2,), (1,)), ((0,), (0,))))
            o = jnp.swapaxes(o.reshape(NUM_KV_HEADS, rows, -1, HEAD_DIM), 0, 1)
            q = o.reshape(q.shape) + 0.1 * q
        return q

    plain, looking = (jax.jit(functools.partial(paged, look)) for look in (False, True))
    whole, alone = jnp.asarray(whole), jnp.asarray(alone)
    long, short = (jnp.full(rows, n, jnp.int32) for n in (shared_tokens + SUFFIX, SUFFIX))
    apart = [draw(NUM_KV_HEADS, shared_tokens, HEAD_DIM) + i for i in range(2 * LAYERS)]
    arrays = q, pool, pool + 0
    np.testing.assert_allclose(
        looking(*arrays, whole, long), plain(*arrays, whole, long), atol=1e-5
    )
    return {
        "shared": functools.partial(looking, *arrays, whole, long),
        "plain": functools.partial(plain, *arrays, whole, long),
        "suffixes": functools.partial(plain, *arrays, alone, short),
        "dense": functools.partial(jax.jit(dense), q, *apart),
        "unshared": functools.partial(looking, *arrays, alone, short),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    quick = parser.parse_args().quick
    repeats = 7 if quick else 21
    rows = []
    for shared_tokens in (512, 2048):
        for num_rows in (8, 64) if quick else (8, 16, 32, 64):
            times = interleaved(forms(num_rows, shared_tokens), repeats)
            best = {name: time["min"] for name, time in times.items()}
            rows.append(
                {
                    "shared tokens": shared_tokens,
                    "rows": num_rows,
                    **{f"{name}, us": t / LAYERS * 1e6 for name, t in best.items()},
                    "over suffixes + dense": best["shared"] / (best["suffixes"] + best["dense"]),
                    "plain over shared": best["plain"] / best["shared"],
                    "unshared over suffixes": best["unshared"] / best["suffixes"],
                }
            )
    show(f"shared prefixes on a CPU, minima per layer, jax {machine()['jax']}", rows)
    print(save("cascade", rows, repeats=repeats, layers=LAYERS))


if __name__ == "__main__":
    main()
