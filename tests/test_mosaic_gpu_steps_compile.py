"""Whole steps of a Llama-3-8B-shaped decoder compiled for an H200 without one.

Sizes that data could make large are primes, so that they can be found again in whatever shape the
compiled program gives them.
"""

import math

import gpu_compile
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from paxattn import kv_cache, page_table
from paxattn.models import Decoder, DecoderConfig
from paxattn.ragged import ragged_batch

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(gpu_compile.why_not() is not None, reason=str(gpu_compile.why_not())),
    pytest.mark.timeout(300),
]

NUM_PAGES, MAX_PAGES, PAGE_SIZE, ROWS = 32_749, 8_191, 16, 64  # 131,056 tokens per row
SHAPE = dict(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128,
)  # fmt: skip
POOL = NUM_PAGES * SHAPE["num_kv_heads"] * PAGE_SIZE * SHAPE["head_dim"] * 2  # bytes of a layer's K


def step(*, num_tokens, max_q_len):
    """Reserve, copy, write, attend, append and choose the likeliest token, with what it takes."""

    def run(pool, model, tokens, q_lens):
        table, cache = pool
        table, ok, copies = page_table.reserve(
            table, q_lens, max_new_pages=-(-max_q_len // PAGE_SIZE)
        )
        cache = kv_cache.copy_pages(cache, copies)
        batch = ragged_batch(table, q_lens, num_tokens=num_tokens, max_q_len=max_q_len, live=ok)
        hidden, cache = model(tokens, batch, cache)
        table, _ = page_table.append(table, jnp.where(ok, q_lens, 0))
        last = hidden[jnp.maximum(batch.cu_q_lens[1:] - 1, 0)]
        return (table, cache), jnp.argmax(model.logits(last), axis=-1)

    model = nnx.eval_shape(
        lambda: Decoder(
            DecoderConfig(**SHAPE), rngs=nnx.Rngs(0), dtype=jnp.bfloat16, stacked=True,
            implementation="mosaic_gpu",
        )
    )  # fmt: skip
    pool = jax.eval_shape(
        lambda: (
            page_table.init_page_table(
                num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_seqs=ROWS, max_pages_per_seq=MAX_PAGES
            ),
            model.init_cache(num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=jnp.bfloat16),
        )
    )
    tokens, q_lens = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (num_tokens, ROWS))
    return jax.jit(run, donate_argnums=0), (pool, model, tokens, q_lens)


STEPS = {
    "decode": dict(num_tokens=ROWS, max_q_len=1),
    "prefill": dict(num_tokens=2048, max_q_len=2048),
}
KERNELS = {
    "decode": {"paged_decode", "merge_parts"},
    "prefill": {"paged_decode", "merge_parts", "paged_prefill"},
}


def program(name):
    """For the process that compiles: `(function, arguments)`."""
    return step(**STEPS[name])


@pytest.mark.parametrize("name", [pytest.param("prefill", marks=pytest.mark.slow), "decode"])
def test_a_step_updates_the_pool_in_place_and_materialises_nothing_large(name):
    facts = gpu_compile.compile_programs("test_mosaic_gpu_steps_compile", [name])[name]
    assert {kernel["name"] for kernel in facts["kernels"]} == KERNELS[name]
    assert sum(kernel["spills"] for kernel in facts["kernels"]) == 0
    assert facts["alias"] >= 2 * SHAPE["num_layers"] * POOL
    assert facts["temp"] < POOL  # (half of it is a copy of the largest matrix)
    # Nothing of [batch, max context] but the block tables, in whatever shape.
    sizes = [math.prod(map(int, shape.split(","))) for shape in facts["shapes"]]
    assert max(size for size in sizes if size % MAX_PAGES == 0) <= ROWS * MAX_PAGES
    # The schedule is made, but not in the loop over layers.
    assert "plan_batch" in facts["scopes"]
    assert "plan_batch" not in facts["looped"]
    assert "attend_batch" in facts["looped"]
