"""The whole jitted decode step of a model of Llama-3-8B's shape, and where its time goes.

The parts are found by leaving some out of the same loop (attention, then the write too), and by
loops of their own for the allocator, the schedule and sampling; what remains are the matrices,
norms and rotation. `of bound` compares the step with reading the weights and all keys and values
once.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from gpu_sections.context import Context
from gpu_sections.device import read_bandwidth
from gpu_sections.profile import emit_kernels
from paxattn import kv_cache, page_table
from paxattn.decode_step import DecodeState, Status, decode
from paxattn.kv_cache import KVCache
from paxattn.models import Decoder, DecoderConfig
from paxattn.nn import schedule_attention
from paxattn.pool import Pool, make_room
from paxattn.ragged import ragged_batch
from paxattn.sampling import SamplingParams, row_sampling, sample
from paxattn.step import no_use

LLAMA_8B = DecoderConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128,
)  # fmt: skip
TINY = DecoderConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16,
)  # fmt: skip
PAGE_SIZE = 16


class Without(nnx.Module):
    """A decoder with something less in the place of `nn.attend`."""

    def __init__(self, decoder: Decoder, attend: Callable[..., Any]) -> None:
        self.decoder, self.attend = decoder, attend

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The decoder's."""
        return self.decoder.logits(hidden)

    def __call__(self, tokens: jax.Array, batch: Any, cache: Any) -> Any:
        """The decoder's, attending so."""
        return self.decoder(tokens, batch, cache, attend=self.attend)


def write_only(q, k, v, cache, batch, *, layer, **options):
    del options
    return q, kv_cache.write(cache, layer, batch.slots, k, v)


def neither(q, k, v, cache, batch, *, layer, **options):
    del k, v, batch, layer, options
    return q, cache


def make_state(config: DecoderConfig, batch: int, context: int, steps: int, dtype) -> DecodeState:
    """Rows that hold `context` tokens of random KV, in pages in random order."""
    per_row = -(-(context + steps + 1) // PAGE_SIZE)
    num_pages = batch * per_row
    table = page_table.init_page_table(
        num_pages=num_pages, page_size=PAGE_SIZE, max_seqs=batch, max_pages_per_seq=per_row
    )
    shuffled = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    table = dataclasses.replace(table, free_pages=jnp.asarray(shuffled))
    lens = jnp.full(batch, context, jnp.int32)
    table, ok, _ = jax.jit(partial(page_table.reserve, max_new_pages=per_row))(table, lens)
    table, _ = jax.jit(page_table.append)(table, lens)
    if not bool(ok.all()):
        raise RuntimeError("the pool is too small")
    shape = (
        config.num_layers, num_pages, config.num_kv_heads, PAGE_SIZE, config.head_dim
    )  # fmt: skip
    k, v = (_draw(i, shape, dtype) for i in (0, 1))
    return DecodeState(
        pool=Pool(
            table=table,
            cache=KVCache(k_pages=k, v_pages=v),
            prefix=None,
            salts=jnp.zeros(batch, jnp.int32),
        ),
        status=jnp.full(batch, int(Status.RUNNING), jnp.int32),
        last_token=jnp.arange(batch, dtype=jnp.int32),
        num_generated=jnp.zeros(batch, jnp.int32),
        max_new_tokens=jnp.full(batch, steps + 1, jnp.int32),  # (nobody ends)
        stop_ids=jnp.full((batch, 8), -1, jnp.int32),
        sampling=row_sampling([SamplingParams()] * batch, batch),
        counts=jnp.zeros((batch, config.vocab_size), jnp.int32),
        tokens=jnp.zeros((batch, steps + 1), jnp.int32),
        logprobs=jnp.zeros((batch, steps + 1), jnp.float32),
        use=no_use(),
    )


@partial(jax.jit, static_argnums=(1, 2))
def _draw(seed: int, shape: tuple[int, ...], dtype) -> jax.Array:
    """Random numbers, layer by layer: those that they are made of take twice their bytes."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), shape[0])
    return lax.map(lambda key: jax.random.uniform(key, shape[1:], dtype, -1, 1), keys)


@partial(jax.jit, donate_argnums=0)
def rewind(state: DecodeState, lens: jax.Array) -> DecodeState:
    """Back to the start, in the same pool."""
    table, _ = page_table.truncate(state.pool.table, lens)
    pool = dataclasses.replace(state.pool, table=table)
    nothing = jnp.zeros_like(state.num_generated)
    return dataclasses.replace(state, pool=pool, num_generated=nothing, use=no_use())


def run(context: Context) -> None:
    config = TINY if context.tiny else LLAMA_8B
    dtype = jnp.float32 if context.tiny else jnp.bfloat16
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, stacked=True)
    read = read_bandwidth(context.tiny)
    model.implementation = (context.implementation, "reference")
    batches, stored, steps = ((2,), 40, 4) if context.tiny else ((64, 1, 256, 8), 1024, 32)
    for batch in batches:
        case = {"batch": batch, "context": stored}
        context.attempt(case, partial(_parts, model, batch, stored, steps, dtype, read))
        if batch == batches[0]:
            profiled = partial(_profile, context, model, batch, stored, steps, dtype)
            context.attempt({"profile of batch": batch}, profiled)


@partial(jax.jit, donate_argnums=1)
def _steps(model: Any, state: DecodeState, steps: jax.Array) -> DecodeState:
    return decode(model, state, steps)


@partial(jax.jit, donate_argnums=1)
def _allocate(model: Decoder, state: DecodeState, steps: jax.Array) -> DecodeState:
    """What a step does to the table, in a loop: room, copies (none here), the count of tokens."""
    del model
    one = jnp.ones_like(state.status)

    def body(_: jax.Array, pool: Pool) -> Pool:
        pool, ok = make_room(pool, one, max_new_tokens=1)
        table, _ = page_table.append(pool.table, jnp.where(ok, one, 0))
        return dataclasses.replace(pool, table=table)

    return dataclasses.replace(state, pool=lax.fori_loop(0, steps, body, state.pool))


@partial(jax.jit, donate_argnums=1)
def _divide(model: Decoder, state: DecodeState, steps: jax.Array) -> DecodeState:
    """Dividing the work of a step's attention, which its layers share, in a loop."""
    table, one = state.pool.table, jnp.ones_like(state.status)

    def divided(i: jax.Array) -> Any:
        longer = dataclasses.replace(table, kv_lens=table.kv_lens + i)
        return schedule_attention(
            ragged_batch(longer, one, num_tokens=one.size, max_q_len=1),
            state.pool.cache,
            num_q_heads=model.config.num_heads,
            dtype=model.embed[...].dtype,
            implementation=model.implementation,
        )

    last = lax.fori_loop(0, steps, lambda i, _: divided(i), divided(jnp.int32(0)))
    # (something that depends on all of it, or nothing would be computed)
    total = sum((jnp.sum(x.astype(jnp.int32)) for x in jax.tree.leaves(last)), jnp.int32(0))
    return dataclasses.replace(state, last_token=state.last_token + total)


@partial(jax.jit, donate_argnums=1)
def _sample(model: Decoder, state: DecodeState, steps: jax.Array) -> DecodeState:
    """Sampling from logits that depend on the last step's."""
    rows, vocabulary = state.status.size, model.config.vocab_size
    logits = jax.random.normal(jax.random.key(0, impl="rbg"), (rows, vocabulary))

    def body(i: jax.Array, carry: tuple) -> tuple:
        logits, _ = carry
        tokens, logprobs = sample(
            logits, state.sampling, state.num_generated + i, lambda: state.counts
        )
        return logits.at[:, 0].add(logprobs), tokens

    _, tokens = lax.fori_loop(0, steps, body, (logits, state.last_token))
    return dataclasses.replace(state, last_token=tokens)


def _parts(model, batch, stored, steps, dtype, read) -> dict:
    loops = {
        "step": partial(_steps, model),
        "no attention": partial(_steps, Without(model, write_only)),
        "no write": partial(_steps, Without(model, neither)),
        "allocator": partial(_allocate, model),
        "schedule": partial(_divide, model),
        "sampling": partial(_sample, model),
    }
    state = make_state(model.config, batch, stored, steps, dtype)
    lens = jnp.full(batch, stored, jnp.int32)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for i in range(5):
        for name, loop in loops.items():
            state = jax.block_until_ready(rewind(state, lens))
            start = time.perf_counter()
            state = jax.block_until_ready(loop(state, jnp.int32(steps)))
            if i:
                times[name].append((time.perf_counter() - start) / steps * 1e3)
    ms = {name: statistics.median(taken) for name, taken in times.items()}
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))) - model.embed[...].nbytes
    num_bytes = weights + batch * (stored + steps / 2) * state.pool.cache.bytes_per_token
    parts = {
        "attention": ms["step"] - ms["no attention"] - ms["schedule"],
        "write": ms["no attention"] - ms["no write"],
        "allocator": ms["allocator"],
        "schedule": ms["schedule"],
        "sampling": ms["sampling"],
    }
    parts["matrices and the rest"] = ms["step"] - sum(parts.values())
    parts["allocator, schedule and write"] = sum(
        parts[name] for name in ("allocator", "schedule", "write")
    )
    return {
        "ms": ms["step"],
        "tokens/s": batch / ms["step"] * 1e3,
        "of bound": num_bytes / read / 1e6 / ms["step"],
        **{f"{name}, %": 100 * part / ms["step"] for name, part in parts.items()},
    }


def _profile(context, model, batch, stored, steps, dtype) -> dict:
    """The kernels of the whole step."""
    state = make_state(model.config, batch, stored, steps, dtype)
    loop = partial(_steps, model)
    lens = jnp.full(batch, stored, jnp.int32)
    state = rewind(jax.block_until_ready(loop(state, jnp.int32(steps))), lens)
    return emit_kernels(context, lambda: loop(state, jnp.int32(steps)), steps)
