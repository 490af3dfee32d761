"""Batches to measure the op with, and how its time is taken.

The time of a call is that of one among many in a single jitted loop, each fed with the result of
the last, so that neither the host nor a launch is measured. Successive calls read other pages (the
block tables take turns), as layers of a model do: no cache keeps what the last call has read.
"""

from __future__ import annotations

import functools
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paxattn.attention.api import paged_attention
from paxattn.attention.choice import Names
from paxattn.kv_cache import heads_in_a_row
from paxattn.quantized import head_bytes, quantize

# Bytes of pages that a loop goes through before it meets the first ones again: several times the
# last cache of any machine.
_COLD_BYTES = 2**28
_MOST_TURNS = 16
_TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be served.

    Attributes:
        rows: of each sequence its new and its stored tokens (the new ones included).
        num_q_heads: Hq.
        num_kv_heads: Hkv.
        head_dim: D.
        page_size: P, tokens.
        dtype: of queries and pages.
        page_dtype: of quantised pages; None: pages are of `dtype`.
    """

    rows: tuple[tuple[int, int], ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    page_dtype: str | None = None

    @property
    def max_q_len(self) -> int:
        """Most new tokens of a row."""
        return max(new for new, _ in self.rows)

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return sum(new for new, _ in self.rows)

    @property
    def num_pages(self) -> int:
        """Pages that the rows hold."""
        return sum(-(-stored // self.page_size) for _, stored in self.rows)

    @property
    def num_bytes(self) -> int:
        """Bytes that must move: every stored key and value once, queries and results."""
        stored = 2 * self.num_kv_heads * sum(stored for _, stored in self.rows)
        new = 2 * self.num_q_heads * self.num_tokens
        stored *= head_bytes(self.head_dim, self.page_dtype or self.dtype)
        return stored + new * head_bytes(self.head_dim, self.dtype)

    @property
    def tolerance(self) -> float:
        """Bound on the `error` of a right answer."""
        # (Hopper's decode kernel multiplies int8 numbers as bf16 ones, whatever the queries are.)
        bf16 = self.page_dtype == "int8" and self.dtype == "float16"
        return _TOLERANCE["bfloat16" if bf16 else self.dtype]

    @property
    def num_flops(self) -> int:
        """Floating point operations of the two products, of what a causal query sees."""
        pairs = sum(new * (stored - new) + new * (new + 1) // 2 for new, stored in self.rows)
        return 4 * pairs * self.num_q_heads * self.head_dim


def parse_rows(text: str) -> tuple[tuple[int, int], ...]:
    """Reads rows: "64x4096" (decode), "2x512/2048" (512 new tokens of 2,048), "1x9+8x64/64".

    Args:
        text: counts of rows, each with its stored, or new and stored, tokens, joined by "+".

    Returns:
        Of each row its new and its stored tokens.

    Raises:
        ValueError: that is not what it says.
    """
    rows: list[tuple[int, int]] = []
    for part in text.split("+"):
        match = re.fullmatch(r"(\d{1,5})x(?:(\d{1,8})/)?(\d{1,8})", part)
        if match is None:
            raise ValueError(
                f"{text!r} is no batch: write 64x4096 for 64 rows of 4096 tokens and a new one, "
                "2x512/2048 for 512 new tokens, and join kinds of rows by +"
            )
        count, new, stored = int(match[1]), int(match[2] or 1), int(match[3])
        if not (count and 1 <= new <= stored):
            raise ValueError(f"{part!r} needs at least one row, and 1 to {stored} new tokens")
        rows += [(new, stored)] * count
    return tuple(rows)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Arrays of a workload, with block tables for several turns.

    Attributes:
        q: [T, Hq, D].
        k_pages: [N, Hkv, P, D], or with heads in pairs, as a cache would have them here.
        v_pages: same.
        tables: i32[turns, R, M], pages in random order; each turn's are its own.
        kv_lens: i32[R].
        cu_q_lens: i32[R + 1].
        k_scales: bf16[N, Hkv, P] of quantised pages, or None.
        v_scales: same.
    """

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    tables: jax.Array
    kv_lens: jax.Array
    cu_q_lens: jax.Array
    k_scales: jax.Array | None = None
    v_scales: jax.Array | None = None


def make_inputs(work: Workload, *, turns: int | None = None, multiple: int = 1) -> Inputs:
    """Draws a workload's arrays.

    Args:
        work: the workload.
        turns: sets of pages; None: as many as keep caches cold.
        multiple: of this the block tables' width is one.

    Returns:
        The arrays, on the default device.
    """
    if turns is None:
        turns = min(max(_COLD_BYTES // work.num_bytes, 1), _MOST_TURNS)
    held = [-(-stored // work.page_size) for _, stored in work.rows]
    num_pages = turns * sum(held)
    pages = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    width = -(-max(held) // multiple) * multiple
    tables = np.full((turns, len(held), width), num_pages, np.int32)
    inside = np.arange(width) < np.asarray(held)[:, None]
    tables[np.broadcast_to(inside, tables.shape)] = pages
    together = heads_in_a_row(work.head_dim)
    heads = -(-work.num_kv_heads // together) * together
    pages_shape = (num_pages, heads, work.page_size, work.head_dim)
    shapes = ((work.num_tokens, work.num_q_heads, work.head_dim), pages_shape, pages_shape)
    q, (k_pages, k_scales), (v_pages, v_scales) = _draw(shapes, work.dtype, work.page_dtype)
    k_pages, v_pages = (_side_by_side(x, together) for x in (k_pages, v_pages))
    new, stored = np.asarray(work.rows, np.int32).T
    return Inputs(
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        tables=jnp.asarray(tables),
        kv_lens=jnp.asarray(stored),
        cu_q_lens=jnp.asarray(np.concatenate([[0], np.cumsum(new)]), jnp.int32),
        k_scales=k_scales,
        v_scales=v_scales,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(
    shapes: tuple[tuple[int, ...], ...], dtype: str, page_dtype: str | None
) -> tuple[jax.Array, Any, Any]:
    """Queries of variance 1, by the generator that compiles and runs fastest; K and V with scales.

    Scales are None if there is no `page_dtype`.
    """
    bound = 3**0.5
    q, k, v = (
        jax.random.uniform(jax.random.key(seed, impl="rbg"), shape, dtype, -bound, bound)
        for seed, shape in enumerate(shapes)
    )
    if page_dtype is None:
        return q, (k, None), (v, None)
    return q, quantize(k, page_dtype), quantize(v, page_dtype)


def _side_by_side(pages: jax.Array, together: int) -> jax.Array:
    """`[N, H, P, D] -> [N, H / together, P, together * D]`."""
    if together == 1:
        return pages
    num_pages, heads, page_size, head_dim = pages.shape
    rows = pages.reshape(num_pages, heads // together, together, page_size, head_dim)
    return jnp.moveaxis(rows, 2, 3).reshape(num_pages, -1, page_size, together * head_dim)


# op(q, inputs, block_tables i32[R, M]) -> [T, Hq, D]
Op = Callable[[jax.Array, Inputs, jax.Array], jax.Array]


def op_of(work: Workload, implementation: Names = None) -> Op:
    """`paged_attention` of a workload."""

    def op(q: jax.Array, x: Inputs, block_tables: jax.Array) -> jax.Array:
        return paged_attention(
            q, x.k_pages, x.v_pages,
            block_tables=block_tables, kv_lens=x.kv_lens, cu_q_lens=x.cu_q_lens,
            max_q_len=work.max_q_len, implementation=implementation,
            k_scales=x.k_scales, v_scales=x.v_scales, num_kv_heads=work.num_kv_heads,
        )  # fmt: skip

    return op


def steps_for(work: Workload) -> int:
    """Calls in a loop: some 10 ms of an accelerator at its peak, or 50 ms of a CPU core."""
    fast = jax.default_backend() != "cpu"
    num_bytes, num_flops, most = (4e10, 5e12, 256) if fast else (5e8, 5e9, 32)
    return int(np.clip(min(num_bytes / work.num_bytes, num_flops / work.num_flops), 2, most))


def compile_loop(op: Op, inputs: Inputs, steps: int) -> Callable[[], jax.Array]:
    """Compiles `steps` calls of an op, each fed with the result of the last.

    Args:
        op: what is to be called.
        inputs: its arrays.
        steps: calls; call `i` reads by the tables of turn `i % turns`.

    Returns:
        A function without arguments that runs them and does not wait for the end. It gives the last
        call's result (`right_answer`), NaN if any call's has one.
    """

    def loop(x: Inputs, zero: jax.Array) -> jax.Array:
        def body(i: jax.Array, o: jax.Array) -> jax.Array:
            return op(x.q + zero * o, x, x.tables[i % x.tables.shape[0]])

        return lax.fori_loop(0, steps, body, jnp.zeros_like(x.q))

    zero = jnp.zeros((), inputs.q.dtype)  # (which the compiler does not know)
    return functools.partial(jax.jit(loop).lower(inputs, zero).compile(), inputs, zero)


def take_turns(
    runs: Mapping[Any, Callable[[], Any]], *, steps: int, repeats: int
) -> dict[Any, float]:
    """Times loops in turns, so that drift of the machine meets all of them alike.

    Args:
        runs: by name, from `compile_loop`.
        steps: calls in each.
        repeats: times that each is run, after a first one that does not count.

    Returns:
        By name: the median of seconds per call.
    """
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i:
                times[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(taken) for name, taken in times.items()}


def right_answer(work: Workload, inputs: Inputs, steps: int) -> jax.Array:
    """What the last of `steps` calls should give: the reference's answer, computed in float32."""
    turn = inputs.tables[(steps - 1) % inputs.tables.shape[0]]
    wide = replace(inputs, q=inputs.q.astype(jnp.float32))
    if work.page_dtype is None:
        k, v = (x.astype(jnp.float32) for x in (inputs.k_pages, inputs.v_pages))
        wide = replace(wide, k_pages=k, v_pages=v)
    return jax.jit(op_of(work, "reference"))(wide.q, wide, turn)


def error(got: jax.Array, right: jax.Array) -> float:
    """The largest error of an answer `[T, Hq, D]` (NaN if there is one in it).

    It is relative to the largest number of the same token and head: the longer a row is, the
    smaller they are, and a fixed bound would take zeros for an answer to 100,000 tokens.
    """
    largest = jnp.max(jnp.abs(right), axis=-1, keepdims=True)
    return float(jnp.max(jnp.abs(got.astype(jnp.float32) - right) / largest))
