"""Other ways to attend through pages, or without, in JAX: each a `compare.Timer`."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp

from gpu_sections.compare import time_op
from gpu_sections.context import transposed
from paxattn.attention import measure
from paxattn.attention.measure import Inputs, Workload


def triton(work: Workload, inputs: Inputs) -> tuple[float, float]:
    """JAX's own kernel, by Pallas' Triton backend (deprecated). Scaling is the caller's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

        def op(q: jax.Array, x: Inputs, tables: jax.Array) -> jax.Array:
            scaled = q * jnp.asarray(work.head_dim**-0.5, q.dtype)
            return paged_attention(
                scaled, x.k_pages, x.v_pages, tables, x.kv_lens,
                interpret=jax.default_backend() == "cpu",
            )  # fmt: skip

        return time_op(op, work, transposed(inputs, (1, 0, 2, 3)), inputs)


def cudnn_paged(work: Workload, inputs: Inputs) -> tuple[float, float]:
    """That of cuDNN, which needs a pool that is one batch exactly."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    if inputs.tables.shape[0] > 1 or inputs.tables[0].size != inputs.k_pages.shape[0]:
        raise NotImplementedError("needs num_pages == rows x pages per row: no cold, shared pool")
    rows = len(work.rows)
    ones = jnp.ones(rows, jnp.int32)

    def op(q: jax.Array, x: Inputs, tables: jax.Array) -> jax.Array:
        table = tables[:, None, :, None]
        o = paged_attention(
            q[:, None], x.k_pages, x.v_pages, ones, x.kv_lens, table, table,
            scale=work.head_dim**-0.5, mask_type=MaskType.PADDING,
        )  # fmt: skip
        return (o[0] if isinstance(o, tuple | list) else o)[:, 0]

    return time_op(op, work, transposed(inputs, (0, 2, 1, 3)), inputs)


def cudnn_dense(work: Workload, inputs: Inputs) -> tuple[float, float]:
    """The one of cuDNN over contiguous keys and values, for whole prompts of equal length."""
    (new, stored), *others = work.rows
    if new != stored or any(row != (new, stored) for row in others) or stored % work.page_size:
        raise NotImplementedError("whole prompts of equal length only")

    turn = (measure.steps_for(work) - 1) % inputs.tables.shape[0]  # (of the call that is checked)

    def contiguous(pages: jax.Array) -> jax.Array:
        x = pages[inputs.tables[turn, :, : stored // work.page_size]]  # [R, M, Hkv, P, D]
        return x.swapaxes(2, 3).reshape(len(work.rows), stored, work.num_kv_heads, work.head_dim)

    dense = dataclasses.replace(
        inputs,
        k_pages=jax.jit(contiguous)(inputs.k_pages),
        v_pages=jax.jit(contiguous)(inputs.v_pages),
    )
    implementation = None if jax.default_backend() == "cpu" else "cudnn"

    def op(q: jax.Array, x: Inputs, tables: jax.Array) -> jax.Array:
        q = q.reshape(len(work.rows), new, *q.shape[1:])
        o = jax.nn.dot_product_attention(
            q, x.k_pages, x.v_pages, is_causal=True, implementation=implementation
        )
        return o.reshape(-1, *o.shape[2:])

    return time_op(op, work, dense, inputs)


DECODE = {"JAX Pallas Triton": triton, "cuDNN paged": cudnn_paged}
PREFILL = {"cuDNN contiguous": cudnn_dense}
