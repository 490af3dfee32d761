"""What the Mosaic TPU kernel serves, and the way into it. Importing this imports no kernel.

`check` declines with a reason, `schedule` cuts a batch into tiles, and `run` serves it.

Why a kernel of our own, where JAX ships one (`pallas.ops.tpu.ragged_paged_attention`): that one
reads pages `[page, token, interleaved K and V heads, head_dim]`, which is not this cache's layout,
and to shuffle pages into it would move the pool in every step. It keeps whole block tables in
scalar memory, where 256 rows of 8,192 pages do not fit; its sliding window skips no page; it
fetches whole blocks past a row's end; it knows neither sinks nor the log-sum-exp that shared
prefixes need; and a row of one query costs it as much arithmetic as a whole tile of prefill.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from paxattn.attention.checks import Request
from paxattn.attention.mosaic_tpu import config
from paxattn.attention.native import launch
from paxattn.kv_cache import PAIRED_HEAD_DIM
from paxattn.target import Target

if TYPE_CHECKING:
    from paxattn.attention.mosaic_tpu.plan import Plan

_KIND = "TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x"


def check(request: Request | None, target: Target) -> str:
    """Says why the kernel can serve a request on a target.

    Args:
        request: what is asked; None: anything at all.
        target: what for.

    Returns:
        The reason.

    Raises:
        NotImplementedError: it cannot; the message says why.
    """
    if target.platform != "tpu" or target.device_kind not in _KIND:
        raise NotImplementedError(
            f"its kernel is for TPUs from v5e and v5p on, not {target.device_kind}"
        )
    if request is None:
        return "a ragged kernel for decode and prefill on TPUs"
    if request.dtype not in config.DTYPES:
        raise NotImplementedError(
            f"dtype {request.dtype} is not one that TPUs compute with: {' or '.join(config.DTYPES)}"
        )
    if request.head_dim == PAIRED_HEAD_DIM:
        raise NotImplementedError(
            f"heads of {PAIRED_HEAD_DIM} do not fill a TPU's {config.LANES} lanes, so XLA stores "
            "such a pool in an order of its own: use a KVCache made for a TPU (init_kv_cache), "
            "which lays them side by side in pairs"
        )
    if request.head_dim not in config.HEAD_DIMS:
        served = PAIRED_HEAD_DIM, *config.HEAD_DIMS
        raise NotImplementedError(f"head_dim={request.head_dim} is not one of {served}")
    if request.page_size % 16:
        raise NotImplementedError(
            f"page_size={request.page_size} is not a multiple of 16, a tile of 16-bit tokens"
        )
    if request.page_dtype is not None and request.page_size not in config.QUANTIZED_PAGE_SIZES:
        raise NotImplementedError(
            f"page_size={request.page_size} of {request.page_dtype} pages is not one of "
            f"{config.QUANTIZED_PAGE_SIZES}, whose scales fill a TPU's 128 lanes"
        )
    group = request.num_q_heads // request.num_kv_heads
    if group > config.MAX_GROUP:
        raise NotImplementedError(
            f"{group} query heads per KV head (or pair of them) are more than {config.MAX_GROUP}, "
            "as far as it is tested"
        )
    if request.ancestors:
        raise NotImplementedError("its kernel knows no ancestor masks (trees of new tokens)")
    short, long = _configs(request)
    about = f"tiles of {short.block_q} queries"
    return f"ragged kernel, {about}" + (f" and of {long.block_q}" if long else "")


def _configs(request: Request) -> tuple[config.Config, config.Config | None]:
    """Block sizes for short rows and for long ones."""
    group = request.num_q_heads // request.num_kv_heads
    short = config.short_q_len(request.max_q_len, group)
    common: dict[str, Any] = dict(
        group=group,
        num_kv_heads=request.num_kv_heads,
        head_dim=request.head_dim,
        page_size=request.page_size,
        dtype=request.dtype,
        page_dtype=request.page_dtype,
        scales_per_head=2 if request.paired else 1,
    )
    few = config.choose(block_q=short, **common)
    if short == request.max_q_len:
        return few, None
    return few, config.choose(block_q=config.long_block_q(group), **common)


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
    """Cuts a batch into tiles.

    Args:
        request: what is static about it, accepted by `check`.
        target: what for.
        block_tables: i32[R, M].
        kv_lens: i32[R].
        cu_q_lens: i32[R + 1].
        sliding_window: i32[] (not positive: none), or None.
        fixed_split: not needed: a TPU's core serves a row in one piece, so its result does not
            depend on the batch anyway.

    Returns:
        The plan.
    """
    from paxattn.attention.mosaic_tpu import plan

    del target, fixed_split
    short, long = _configs(request)
    return plan.plan_batch(
        block_tables=block_tables,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        sliding_window=sliding_window,
        request=request,
        short=short,
        long=long,
    )


def run(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    sinks: jax.Array | None,
    plan: Plan,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    max_q_len: int,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """The implementation named "mosaic_tpu".

    Args:
        q: [T, Hq, D], bf16 or f32.
        k_pages: [L, N, Hkv, P, D], or [N, Hkv, P, D] without `layer`.
        v_pages: same.
        sinks: f32[Hq] or None.
        plan: from `schedule`.
        block_tables: i32[R, M]; the plan has what matters of it, and of the next three.
        kv_lens: i32[R].
        cu_q_lens: i32[R + 1].
        max_q_len: bound on a row's new tokens.
        **options: the other arguments of `op.attend_batch`.

    Returns:
        o [T, Hq, D] in q's dtype, lse f32[T, Hq].

    Raises:
        NotImplementedError: see `native.launch`.
    """
    del block_tables, kv_lens, cu_q_lens, max_q_len
    # Imported late: jax's kernel language is slow to import, and not the same in every release.
    from paxattn.attention.mosaic_tpu import op

    def kernels(q: Any, k_pages: Any, v_pages: Any, sinks: Any) -> Any:
        return op.attend_batch(q, k_pages, v_pages, sinks=sinks, plan=plan, **options)

    return launch("mosaic_tpu", kernels, q, k_pages, v_pages, sinks)
