"""What the Mosaic GPU kernels serve, and the way into them. Importing this imports no kernel.

`check` declines with a reason; `run` sends a batch to the kernel for its kind. Today that is the
decode kernel alone: batches with more packed query rows per KV head than its tile holds are
declined. (A prefill kernel joins in `_kernel_for`.)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import jax

from paxattn.attention.checks import Request
from paxattn.attention.mosaic_gpu.config import (
    DTYPES,
    HEAD_DIMS,
    default_config,
    max_rows,
    packed_rows,
)

if TYPE_CHECKING:
    from paxattn.attention.choice import Target

_HOPPER = re.compile(r"\b(GH200|H200|H100|H800|H20)\b")
_SMS = {"NVIDIA H100 PCIe": 114, "NVIDIA H20": 78}  # others: 132
PAGE_SIZES = (8, 16, 32, 64, 128)


def check(request: Request | None, target: Target) -> str:
    """Says why the kernels can serve a request on a target.

    Args:
        request: what is asked; None: anything at all.
        target: what for.

    Returns:
        The reason.

    Raises:
        NotImplementedError: they cannot; the message says why.
    """
    if target.platform != "gpu" or not _HOPPER.search(target.device_kind):
        raise NotImplementedError(
            f"its kernels are for NVIDIA Hopper GPUs (H100, H200, GH200), not {target.device_kind}"
        )
    if request is None:
        return "decode kernel for NVIDIA Hopper GPUs"
    if request.dtype not in DTYPES:
        raise NotImplementedError(
            f"dtype {request.dtype} is not one that the tensor cores take: {' or '.join(DTYPES)}"
        )
    if request.head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"head_dim={request.head_dim} is not one of {HEAD_DIMS}")
    if request.page_size not in PAGE_SIZES:
        raise NotImplementedError(f"page_size={request.page_size} is not one of {PAGE_SIZES}")
    if request.ancestors:
        raise NotImplementedError("its kernels know no ancestor masks (trees of new tokens)")
    return _kernel_for(request)


def _kernel_for(request: Request) -> str:
    """Names the kernel for a batch: the place where one for long rows will join."""
    group = request.num_q_heads // request.num_kv_heads
    rows, most = request.max_q_len * group, max_rows(request.head_dim)
    if rows <= most:
        return f"decode kernel, {packed_rows(request.max_q_len, group)} query rows per KV head"
    raise NotImplementedError(
        f"max_q_len={request.max_q_len} new tokens x {group} query heads per KV head are {rows} "
        f"query rows, more than the {most} of the decode kernel with head_dim={request.head_dim}, "
        "and there is no prefill kernel yet (in a decode step, pass max_q_len=1)"
    )


def run(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, *, sinks: jax.Array | None, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """The implementation named "mosaic_gpu". Arguments are as those of the reference.

    Args:
        q: [T, Hq, D], bf16 or f16.
        k_pages: [L, N, Hkv, P, D], or [N, Hkv, P, D] without `layer`.
        v_pages: same.
        sinks: f32[Hq] or None.
        **options: the other arguments of `paged_attention_reference`.

    Returns:
        o [T, Hq, D] in q's dtype, lse f32[T, Hq].

    Raises:
        NotImplementedError: a gradient is asked for.
    """
    from paxattn.attention import choice

    heads, _, head_dim = k_pages.shape[-3:]
    config = default_config(
        rows=packed_rows(options["max_q_len"], q.shape[1] // heads),
        head_dim=head_dim,
        num_sms=_SMS.get(choice.target_of(q).device_kind, 132),
    )
    return run_with(q, k_pages, v_pages, sinks=sinks, config=config, **options)


def run_with(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, *, sinks: jax.Array | None, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """`run`, with a given `config` (and `interpret`, without a GPU).

    Args:
        q: as in `run`, like the other arguments.
        k_pages: same.
        v_pages: same.
        sinks: same.
        **options: those of `op.attend_short_rows`.

    Returns:
        o and lse.

    Raises:
        NotImplementedError: a gradient is asked for, or the caller is a `shard_map` that checks
            over which axes values vary, which Pallas' kernels for warps do not support.
    """
    if any(jax.typeof(x).manual_axis_type.varying for x in (q, k_pages, v_pages)):
        raise NotImplementedError(
            "mosaic_gpu runs inside a jax.shard_map only with check_vma=False (Pallas cannot tell "
            "over which mesh axes a kernel's results vary); implementation='reference' needs none"
        )
    # Imported late: jax's kernel language is slow to import, and not the same in every release.
    from paxattn.attention.mosaic_gpu import op

    @jax.custom_jvp
    def attend(q: Any, k_pages: Any, v_pages: Any, sinks: Any) -> Any:
        return op.attend_short_rows(q, k_pages, v_pages, sinks=sinks, **options)

    @attend.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError("mosaic_gpu has no gradient: use implementation='reference'")

    return attend(q, k_pages, v_pages, sinks)
