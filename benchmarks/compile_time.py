"""Compile time of one decode step against the decoder's depth.

    python benchmarks/compile_time.py [--rounds 5] [--depths 4 32]

Lowers and compiles a decode step (batch 8, float32, the width of a 25M-parameter Llama) of
decoders of several depths, with the matrices in both storages, from cold caches, runs interleaved,
medians of wall-clock and of processor time. No weights are made: shapes are enough to compile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
from _common import interleaved, machine, save, show
from flax import nnx

from paxattn.models import Decoder, DecoderConfig
from paxattn.page_table import append, init_page_table, reserve
from paxattn.ragged import ragged_batch

BATCH, PAGE_SIZE, PAGES_PER_SEQ = 8, 16, 16


def decode_step(decoder, table, cache, tokens):
    ones = jnp.ones(BATCH, jnp.int32)
    table, _, _ = reserve(table, ones)
    batch = ragged_batch(table, ones, num_tokens=BATCH, max_q_len=1)
    hidden, cache = decoder(tokens, batch, cache)
    table, _ = append(table, ones)
    return table, cache, decoder.logits(hidden).argmax(-1).astype(jnp.int32)


def shapes(num_layers: int, stacked: bool):
    config = DecoderConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=num_layers,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
    )
    num_pages = BATCH * PAGES_PER_SEQ

    def make():
        decoder = Decoder(config, rngs=nnx.Rngs(0), stacked=stacked)
        table = init_page_table(
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            max_seqs=BATCH,
            max_pages_per_seq=PAGES_PER_SEQ,
        )
        cache = decoder.init_cache(num_pages=num_pages, page_size=PAGE_SIZE)
        return decoder, table, cache, jnp.zeros(BATCH, jnp.int32)

    return nnx.eval_shape(make)


def compile_once(arguments, cpu_seconds: list[float]) -> float:
    jax.clear_caches()
    start, cpu_start = time.perf_counter(), time.process_time()
    jax.jit(decode_step, donate_argnums=(1, 2)).lower(*arguments).compile()
    cpu_seconds.append(time.process_time() - cpu_start)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 32], metavar="LAYERS")
    args = parser.parse_args()
    cases = [(stacked, depth) for stacked in (False, True) for depth in args.depths]
    cpu: dict[tuple, list[float]] = {case: [] for case in cases}
    functions = {
        str(case): partial(compile_once, shapes(case[1], case[0]), cpu[case]) for case in cases
    }
    seconds = interleaved(functions, args.rounds)
    rows = []
    for case in cases:
        first = (case[0], args.depths[0])
        wall, cpu_median = seconds[str(case)]["median"], statistics.median(cpu[case][1:])
        rows.append(
            {
                "storage": "stacked" if case[0] else "separate",
                "layers": case[1],
                "seconds": wall,
                "ratio": wall / seconds[str(first)]["median"],
                "cpu seconds": cpu_median,
                "cpu ratio": cpu_median / statistics.median(cpu[first][1:]),
            }
        )
    show(f"compile time of a decode step, {machine()}", rows)
    print(f"wrote {save('compile_time', rows, batch=BATCH)}")


if __name__ == "__main__":
    main()
