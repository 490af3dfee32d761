"""What the Mosaic GPU kernels serve, and the way into them. Importing this imports no kernel.

`check` declines with a reason, `schedule` divides a batch between the two kernels and over the
multiprocessors, and `run` serves it so.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import jax

from paxattn.attention.checks import Request
from paxattn.attention.mosaic_gpu import prefill_config, tunable
from paxattn.attention.mosaic_gpu.config import (
    DTYPES,
    HEAD_DIMS,
    QUANTIZED_HEAD_DIMS,
    packed_rows,
    short_q_len,
)
from paxattn.attention.native import launch
from paxattn.attention.target import Target

if TYPE_CHECKING:
    from paxattn.attention.mosaic_gpu.plan import Plan

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
        return "decode and prefill kernels for NVIDIA Hopper GPUs"
    if request.dtype not in DTYPES:
        raise NotImplementedError(
            f"dtype {request.dtype} is not one that the tensor cores take: {' or '.join(DTYPES)}"
        )
    if request.page_dtype is not None and jax.__version_info__ < (0, 11):
        raise NotImplementedError(  # (0.10 copies no fewer than 128 bytes, as scales of a page are)
            f"its decode kernel reads quantised pages ({request.page_dtype}) from jax 0.11 on"
        )
    head_dims = HEAD_DIMS if request.page_dtype is None else QUANTIZED_HEAD_DIMS
    if request.head_dim not in head_dims:
        raise NotImplementedError(f"head_dim={request.head_dim} is not one of {head_dims}")
    if request.page_size not in PAGE_SIZES:
        raise NotImplementedError(f"page_size={request.page_size} is not one of {PAGE_SIZES}")
    if request.ancestors:
        raise NotImplementedError("its kernels know no ancestor masks (trees of new tokens)")
    return _kernel_for(request)


def _kernel_for(request: Request) -> str:
    """Names the kernels that a batch needs, and why."""
    group = request.num_q_heads // request.num_kv_heads
    short = short_q_len(request.max_q_len, group, request.head_dim)
    decode = f"decode kernel, {packed_rows(short, group)} query rows per KV head"
    if short == request.max_q_len:
        return decode
    if request.page_dtype is not None:
        raise NotImplementedError(
            f"its prefill kernel reads no quantised pages ({request.page_dtype}), and rows of "
            f"{request.max_q_len} new tokens do not fit the decode kernel"
        )
    prefill_config.check(request)
    return "prefill kernel" if short == 0 else f"prefill kernel; rows of at most {short}: {decode}"


def schedule(
    request: Request,
    target: Target,
    *,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    sliding_window: jax.Array | int | None,
    fixed_split: int | None,
) -> Plan:
    """Divides a batch between the kernels and over the multiprocessors.

    Args:
        request: what is static about it, accepted by `check`.
        target: what for.
        block_tables: i32[R, M].
        kv_lens: i32[R].
        cu_q_lens: i32[R + 1].
        sliding_window: i32[] (not positive: none), or None.
        fixed_split: tokens per piece of a row, or None. (The prefill kernel never cuts a row's
            tokens: its results do not depend on the batch anyway.)

    Returns:
        The plan.
    """
    from paxattn.attention.mosaic_gpu import plan

    group, head_dim = request.num_q_heads // request.num_kv_heads, request.head_dim
    short = short_q_len(request.max_q_len, group, head_dim)
    common: dict[str, Any] = dict(
        device=target.device_kind,
        dtype=request.dtype,
        head_dim=head_dim,
        page_size=request.page_size,
        num_sms=sms(target),
    )
    return plan.plan_batch(
        block_tables=block_tables,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        sliding_window=sliding_window,
        request=request,
        short_q_len=short,
        decode=tunable.decode_config(
            **common,
            rows=packed_rows(short, group),
            split=fixed_split,
            quantized=request.page_dtype is not None,
        )
        if short
        else None,
        prefill=tunable.prefill_config(**common) if short < request.max_q_len else None,
    )


def sms(target: Target) -> int:
    """Multiprocessors of a target."""
    return _SMS.get(target.device_kind, 132)


def run(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    sinks: jax.Array | None,
    plan: Plan,
    kv_lens: jax.Array,
    max_q_len: int,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """The implementation named "mosaic_gpu".

    Args:
        q: [T, Hq, D], bf16 or f16.
        k_pages: [L, N, Hkv, P, D], or [N, Hkv, P, D] without `layer`.
        v_pages: same.
        sinks: f32[Hq] or None.
        plan: from `schedule`.
        kv_lens: i32[R]; the plan has what matters of it.
        max_q_len: same.
        **options: the other arguments of `op.attend_batch`.

    Returns:
        o [T, Hq, D] in q's dtype, lse f32[T, Hq].

    Raises:
        NotImplementedError: see `native.launch`.
    """
    del kv_lens, max_q_len
    # Imported late: jax's kernel language is slow to import, and not the same in every release.
    from paxattn.attention.mosaic_gpu import op

    def kernels(q: Any, k_pages: Any, v_pages: Any, sinks: Any) -> Any:
        return op.attend_batch(q, k_pages, v_pages, sinks=sinks, plan=plan, **options)

    return launch("mosaic_gpu", kernels, q, k_pages, v_pages, sinks)
