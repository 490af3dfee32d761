"""What the Mosaic GPU kernels serve, and the way into them. Importing this imports no kernel.

Rows of few new tokens go to a decode kernel, the others to a prefill kernel. Each is Hopper's own
where that can serve, else the portable one. `check` tells which do, or declines with a reason,
`hold_back` whether they were checked on such a device, `schedule` divides a batch between them and
over the multiprocessors, and `run` serves it so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from paxattn.attention import tuning
from paxattn.attention.checks import Request
from paxattn.attention.mosaic_gpu import config, prefill_config, tunable
from paxattn.attention.mosaic_gpu.config import DTYPES, HEAD_DIMS, short_q_len
from paxattn.attention.mosaic_gpu.portable import cards
from paxattn.attention.mosaic_gpu.portable import config as portable
from paxattn.attention.mosaic_gpu.portable.cards import Card
from paxattn.attention.native import launch
from paxattn.target import Target

if TYPE_CHECKING:
    from paxattn.attention.mosaic_gpu.plan import Plan

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
        return _offer(card)
    if request.dtype not in DTYPES:
        raise NotImplementedError(
            f"dtype {request.dtype} is not one that the tensor cores take: {' or '.join(DTYPES)}"
        )
    if request.paired:
        raise NotImplementedError("its kernels know no KV heads that lie side by side in pairs")
    if request.head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"head_dim={request.head_dim} is not one of {HEAD_DIMS}")
    if request.page_dtype is not None and jax.__version_info__ < (0, 11):
        # (0.10 copies no fewer than 128 bytes, and scales are less)
        raise NotImplementedError(
            f"its kernels read quantised pages ({request.page_dtype}) from jax 0.11 on"
        )
    if request.page_size not in PAGE_SIZES:
        raise NotImplementedError(f"page_size={request.page_size} is not one of {PAGE_SIZES}")
    if request.ancestors:
        raise NotImplementedError("its kernels know no ancestor masks (trees of new tokens)")
    parts = _divide(request, card)
    if any(kernel is not None and kernel.card for kernel in (parts.decode, parts.prefill)):
        portable.check(request, card)
    told = []
    if parts.prefill is not None:
        told.append(parts.prefill.name)
    if parts.decode is not None:
        told.append(f"{parts.decode.name}, {parts.rows} query rows per KV head")
    return f"; rows of at most {parts.short}: ".join(told)


def hold_back(request: Request | None, target: Target) -> str:
    """Says why a request should not be served by default, or "".

    A kernel that was never seen to be right on a kind of device is not for those who have not asked
    for it. Tuning checks what it times against the reference, so the table of tuned configs tells.

    Args:
        request: what is asked, accepted by `check`; None: anything at all.
        target: what for.

    Returns:
        The reason.

    Raises:
        ValueError: a table is damaged.
    """
    card = _card(target)
    if request is None:
        own = None if card.hopper else card
        needed, page_dtype = [tunable.decode_name(own), tunable.prefill_name(own)], None
    else:
        parts, page_dtype = _divide(request, card), request.page_dtype
        needed = [tunable.decode_name(parts.decode.card)] if parts.decode else []
        needed += [tunable.prefill_name(parts.prefill.card)] if parts.prefill else []
    seen = tuning.measured_on(target.device_kind, page_dtype=page_dtype)
    new = [name for name in needed if name not in seen]
    if not new:
        return ""
    return (
        f"{' and '.join(new)} not checked on {target.device_kind} yet: run "
        f"`paxattn bench --tune{_options(request)}` there once, which compares with the reference, "
        "times, and makes what is right the default; or pass implementation='mosaic_gpu' to run it "
        "unchecked"
    )


def _options(request: Request | None) -> str:
    """Those of `paxattn bench` with which the kernels of a request serve."""
    if request is None:
        return ""
    pages = "" if request.page_dtype is None else f" --kv-dtype {request.page_dtype}"
    return (
        f" --heads {request.num_q_heads}/{request.num_kv_heads} --head-dim {request.head_dim}"
        f" --page-size {request.page_size} --dtype {request.dtype}{pages}"
    )


def _offer(card: Card) -> str:
    """What there is for a card."""
    pages = "pages of floats"
    if jax.__version_info__ >= (0, 11):
        pages += ", int8 and fp8" if card.fp8 else " and int8"
    if card.hopper:
        return f"decode and prefill kernels for NVIDIA Hopper GPUs; {pages}"
    copies = "TMA" if card.tma else "cp.async"
    return (
        f"portable decode and prefill kernels, for {card.arch} ({copies}, warp-level mma); {pages}"
    )


def _card(target: Target) -> Card:
    """The card that the kernels are to run on."""
    kind = target.device_kind
    if target.platform == "gpu":
        card = cards.card_of(kind)
        if card is not None:
            if not card.hopper and jax.__version_info__ < (0, 11):
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


class _Kernel(NamedTuple):
    """What serves a part of a batch: with a card the portable kernel, else Hopper's own."""

    card: Card | None
    name: str


class _Parts(NamedTuple):
    """Who serves what.

    Attributes:
        short: bound on the new tokens of rows for the decode kernel.
        rows: packed query rows of its tiles.
        decode: that kernel; None: no row is so short.
        prefill: the other; None: no row is longer.
    """

    short: int
    rows: int
    decode: _Kernel | None
    prefill: _Kernel | None


def _kernel(kind: str, request: Request, card: Card, why_not: Callable[[Request], str]) -> _Kernel:
    """Chooses the kernel of a kind; `why_not` tells what keeps Hopper's own from a request."""
    why = why_not(request) if card.hopper else ""
    if card.hopper and not why:
        return _Kernel(None, f"{kind} kernel")
    name = f"portable ({card.arch}) {kind} kernel"
    return _Kernel(card, f"{name} (not Hopper's own: {why})" if why else name)


def _divide(request: Request, card: Card) -> _Parts:
    group, head_dim = request.num_q_heads // request.num_kv_heads, request.head_dim
    decode = _kernel("decode", request, card, config.why_not)
    if decode.card is None:
        most = config.max_rows(head_dim, quantized=request.page_dtype is not None)
        short = short_q_len(request.max_q_len, group, head_dim, most)
        rows = config.packed_rows(short, group)
    else:
        short = short_q_len(request.max_q_len, group, head_dim, portable.max_rows(head_dim))
        rows = portable.packed_rows(short, group, head_dim)
    prefill = _kernel("prefill", request, card, prefill_config.why_not)
    return _Parts(
        short=short,
        rows=rows,
        decode=decode if short else None,
        prefill=prefill if short < request.max_q_len else None,
    )


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
        fixed_split: tokens per piece of a row, or None. (With it, the prefill kernels never cut a
            row's tokens.)

    Returns:
        The plan.
    """
    from paxattn.attention.mosaic_gpu import plan

    card = _card(target)
    parts = _divide(request, card)
    decode, prefill = parts.decode, parts.prefill
    given: dict[str, Any] = dict(
        device=target.device_kind,
        dtype=request.dtype,
        page_dtype=request.page_dtype,
        head_dim=request.head_dim,
        page_size=request.page_size,
        num_sms=card.num_sms,
    )
    sizes: dict[str, Any] = dict(decode=None, prefill=None)
    if decode is not None:
        pick = tunable.decode_config
        sizes["decode"] = pick(
            decode.card, **given, rows=parts.rows, split=fixed_split, max_q_len=parts.short
        )
        sizes["decode_card"] = decode.card
    if prefill is not None:
        sizes["prefill"] = tunable.prefill_config(prefill.card, **given)
        sizes["prefill_card"] = prefill.card
        sizes["split_over"] = card.num_sms if fixed_split is None else None
    return plan.plan_batch(
        block_tables=block_tables,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        sliding_window=sliding_window,
        request=request,
        short_q_len=parts.short,
        **sizes,
    )


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
