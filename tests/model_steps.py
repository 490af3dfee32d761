"""The step loop that model tests drive on plain prompts: a prefill, then forced decode steps.

What the page table does in such a loop does not depend on the model, so it is planned by one
function that all models share, and compiled once.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paxattn.page_table import append, init_page_table, reserve
from paxattn.ragged import ragged_batch


@partial(jax.jit, static_argnames=("num_tokens", "max_q_len", "steps", "page_size", "num_pages"))
def plan(q_lens, *, num_tokens, max_q_len, steps, page_size, num_pages):
    """Batches of a prefill of ``q_lens`` tokens and, stacked, of ``steps`` decode steps."""
    rows = q_lens.shape[0]
    per_row = num_pages // rows
    table = init_page_table(
        num_pages=num_pages, page_size=page_size, max_seqs=rows, max_pages_per_seq=per_row
    )

    def step(table, q_lens, num_tokens, max_q_len):
        table, _, _ = reserve(table, q_lens, max_new_pages=-(-max_q_len // page_size) + 1)
        batch = ragged_batch(table, q_lens, num_tokens=num_tokens, max_q_len=max_q_len)
        return append(table, q_lens)[0], batch

    table, prefill = step(table, q_lens, num_tokens, max_q_len)
    ones = jnp.ones(rows, jnp.int32)
    _, decode = lax.scan(lambda table, _: step(table, ones, rows, 1), table, length=steps)
    return prefill, decode


# LLVM's optimisations take most of the time here, and what is compared is mathematics.
UNOPTIMISED = {"xla_backend_optimization_level": 0}


@partial(
    jax.jit,
    static_argnames=("page_size", "num_pages", "attend"),
    compiler_options=UNOPTIMISED,
)
def run(decoder, tokens, forced, prefill, decode, cache=None, attend=None, **sizes):
    """Hidden states and logits of the prefill, logits of every decode step, and the last cache."""
    options = {} if attend is None else {"attend": attend}
    cache = decoder.init_cache(**sizes) if cache is None else cache
    hidden, cache = decoder(tokens, prefill, cache, **options)
    logits = decoder.logits(hidden)

    def step(cache, tokens_and_batch):
        hidden, cache = decoder(*tokens_and_batch, cache, **options)
        return cache, decoder.logits(hidden)

    _, decoded = lax.scan(step, cache, (forced.T, decode))
    return hidden, logits, decoded


def teacher_forced(decoder, prompts, forced, *, page_size=8, padding=(), cache=None, attend=None):
    """Logits of ragged prompts and of forced continuations.

    ``padding`` are token ids behind the prompts. Returns (prefill f32[sum of prompt lengths, V],
    decode f32[steps, R, V], hidden [T, E]): the logits after each prompt token and each forced
    token, and the prefill's hidden states with those of the padding.
    """
    lens = np.array([len(prompt) for prompt in prompts], np.int32)
    steps = np.shape(forced)[1]
    packed = np.concatenate([*map(np.asarray, prompts), np.array(padding, np.int64)])
    num_pages = len(prompts) * -(-(int(lens.max()) + steps) // page_size)
    sizes = dict(page_size=page_size, num_pages=num_pages)
    batches = plan(lens, num_tokens=len(packed), max_q_len=int(lens.max()), steps=steps, **sizes)
    tokens, forced = jnp.asarray(packed, jnp.int32), jnp.asarray(forced, jnp.int32)
    hidden, prefill, decoded = run(
        decoder, tokens, forced, *batches, cache=cache, attend=attend, **sizes
    )
    return np.asarray(prefill)[: lens.sum()], np.asarray(decoded), np.asarray(hidden)
