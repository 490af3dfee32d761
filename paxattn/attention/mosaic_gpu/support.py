"""What the Mosaic GPU kernels serve, and the way into them. Importing this imports no kernel.

`check` declines with a reason, `schedule` divides a batch between the two kernels and over the
multiprocessors, and `run` serves it so.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import jax

from paxattn.attention.checks import Request
from paxattn.attention.mosaic_gpu import prefill_config, tunable
from paxattn.attention.mosaic_gpu.config import (
    DTYPES,
    HEAD_DIMS,
    QUANTIZED_HEAD_DIMS,
    max_rows,
    packed_rows,
    short_q_len,
)
from paxattn.attention.mosaic_gpu.portable import cards
from paxattn.attention.mosaic_gpu.portable import config as portable
from paxattn.attention.mosaic_gpu.portable.cards import Card
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
    card = _card(target)
    if request is None:
        pages = "pages of floats" + ("" if jax.__version_info__ < (0, 11) else ", int8 and fp8")
        if card is None:
            return f"decode and prefill kernels for NVIDIA Hopper GPUs; {pages}"
        copies, pages = "TMA" if card.tma else "cp.async", "int8 and fp8" if card.fp8 else "int8"
        return (
            f"portable decode and prefill kernels, for {card.arch} ({copies}, warp-level mma); "
            f"pages of floats, {pages}"
        )
    if request.dtype not in DTYPES:
        raise NotImplementedError(
            f"dtype {request.dtype} is not one that the tensor cores take: {' or '.join(DTYPES)}"
        )
    if request.head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"head_dim={request.head_dim} is not one of {HEAD_DIMS}")
    if request.page_dtype is not None:
        _check_quantized(request.head_dim, f"quantised pages ({request.page_dtype})")
    if request.page_size not in PAGE_SIZES:
        raise NotImplementedError(f"page_size={request.page_size} is not one of {PAGE_SIZES}")
    if request.ancestors:
        raise NotImplementedError("its kernels know no ancestor masks (trees of new tokens)")
    if card is not None:
        portable.check(request, card)
    return _kernel_for(request, card)


def _check_quantized(head_dim: int, pages: str) -> None:
    """Declines quantised pages that no kernel reads."""
    if jax.__version_info__ < (0, 11):  # (0.10 copies no fewer than 128 bytes, and scales are less)
        raise NotImplementedError(f"its kernels read {pages} from jax 0.11 on")
    if head_dim not in QUANTIZED_HEAD_DIMS:
        raise NotImplementedError(f"{head_dim=} with {pages} is not one of {QUANTIZED_HEAD_DIMS}")


def _card(target: Target) -> Card | None:
    """The card that the portable kernels run on; None for Hopper, which has its own."""
    kind = target.device_kind
    if target.platform == "gpu":
        if _HOPPER.search(kind):
            return None
        card = cards.card_of(kind)
        if card is not None:
            if jax.__version_info__ < (0, 11):
                raise NotImplementedError(f"its kernels for {kind} need jax 0.11 or newer")
            return card
        if cards.is_older(kind):
            raise NotImplementedError(
                f"its kernels need cp.async and bfloat16 matrix instructions, which came with "
                f"Ampere: {kind} is older"
            )
    raise NotImplementedError(
        "its kernels are for NVIDIA GPUs from Ampere on (A100, RTX 3090, RTX 4090, H100, H200, "
        f"B200, RTX 5090 and others by name), not {kind}"
    )


def _short_rows(request: Request, card: Card | None) -> tuple[int, int]:
    """Bound on the new tokens of rows for the decode kernel, and packed rows of its tiles."""
    group, head_dim = request.num_q_heads // request.num_kv_heads, request.head_dim
    if card is None:
        most = max_rows(head_dim, quantized=request.page_dtype is not None)
        short = short_q_len(request.max_q_len, group, head_dim, most)
        return short, packed_rows(short, group)
    short = short_q_len(request.max_q_len, group, head_dim, portable.max_rows(head_dim))
    return short, portable.packed_rows(short, group, head_dim)


def _kernel_for(request: Request, card: Card | None) -> str:
    """Names the kernels that a batch needs, and why."""
    which = "" if card is None else f"portable ({card.arch}) "
    short, rows = _short_rows(request, card)
    decode = f"{which}decode kernel, {rows} query rows per KV head"
    if short == request.max_q_len:
        return decode
    if card is None:
        prefill_config.check(request)
    prefill = f"{which}prefill kernel"
    return prefill if short == 0 else f"{prefill}; rows of at most {short}: {decode}"


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

    card = _card(target)
    short, rows = _short_rows(request, card)
    common: dict[str, Any] = dict(
        device=target.device_kind,
        dtype=request.dtype,
        head_dim=request.head_dim,
        page_size=request.page_size,
        quantized=request.page_dtype is not None,
    )
    pick_decode: Any = tunable.decode_config
    pick_prefill: Any = tunable.prefill_config
    if card is None:
        common["num_sms"] = sms(target)
    else:
        pick_decode = functools.partial(tunable.portable_decode_config, card)
        pick_prefill = functools.partial(tunable.portable_prefill_config, card)
    return plan.plan_batch(
        block_tables=block_tables,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        sliding_window=sliding_window,
        request=request,
        short_q_len=short,
        decode=pick_decode(**common, rows=rows, split=fixed_split) if short else None,
        prefill=pick_prefill(**common) if short < request.max_q_len else None,
        card=card,
    )


def sms(target: Target) -> int:
    """Multiprocessors of a Hopper GPU."""
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
