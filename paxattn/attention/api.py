"""`paged_attention`: the public op. Arguments are checked, an implementation is chosen, and run."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxattn.attention import checks, choice
from paxattn.attention.cascade import attend_shared
from paxattn.attention.choice import AttentionSchedule, Explanation, Names
from paxattn.attention.pairs import attend_pairs
from paxattn.shared_prefix import SharedPrefix
from paxattn.target import target_of


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    layer: jax.Array | int | None = None,
    max_q_len: int | None = None,
    sm_scale: jax.Array | float | None = None,
    causal: bool = True,
    sliding_window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    ancestors: jax.Array | None = None,
    shared: SharedPrefix | None = None,
    num_kv_heads: int | None = None,
    implementation: Names = None,
    return_lse: bool = False,
    fixed_split: int | None = None,
    schedule: AttentionSchedule | None = None,
) -> Any:
    """Attends from a ragged batch of new tokens to sequences whose KV lies in pages.

    Row `r` is a sequence of `kv_lens[r]` stored tokens. Token `t` of it lies in page
    `block_tables[r, t // P]`, at offset `t % P`. Its new tokens, already written, are the last
    `cu_q_lens[r + 1] - cu_q_lens[r]` of them, and their queries are
    `q[cu_q_lens[r] : cu_q_lens[r + 1]]`; so prefill, decode, chunked prefill and speculative steps
    are the same call.

    Letters: T tokens in the batch, R rows, M `max_pages_per_seq`, L layers, N pages, P `page_size`,
    D head_dim, Hq query heads, Hkv KV heads (query head `h` reads KV head `h // (Hq // Hkv)`).

    Args:
        q: [T, Hq, D], f32, bf16 or f16.
        k_pages: [N, Hkv, P, D], or [L, N, Hkv, P, D] together with `layer`; q's dtype, or
            float8_e4m3fn or int8 together with scales. Heads of 64 may lie in pairs, as `kv_cache`
            has them on TPUs: [N, ceil(Hkv / 2), P, 128], together with `num_kv_heads`.
        v_pages: same.
        block_tables: i32[R, M]; entries that are no page hold N.
        kv_lens: i32[R], tokens stored, the new ones included.
        cu_q_lens: i32[R + 1], running sum of new tokens per row, from 0. `q` past the last is
            padding.
        layer: which layer of stacked pages, int or i32[] (traced: the pool is not sliced).
        max_q_len: static bound on every row's new tokens (1: a decode step). None: T.
        sm_scale: factor on `q . k`. None: `D ** -0.5`.
        causal: a query sees its own position and those before. False: all `kv_lens[r]` tokens.
        sliding_window: tokens that a query sees, itself included: an int, or an i32[] (traced, so
            that scanned layers may differ), where a value that is not positive means no window.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)`.
        sinks: f32[Hq], one more logit per head in the softmax's denominator.
        k_scales: bf16, the shape of `k_pages` without D (and with a place for each head of a pair):
            what the numbers of quantised pages are multiplied by, see `quantized`.
        v_scales: same, of `v_pages`.
        ancestors: u32[T], for new tokens that form a tree (of guesses) rather than a chain: bit `j`
            says that the token sees its row's new token `j`, itself included, parents before
            children; at most 32 new tokens per row. All stored before are seen. A token's position
            is that of the first new one plus its depth, its number of ancestors.
        shared: of this batch, from `shared_prefix.find_shared_prefix`: what rows share is read once
            for all of them where that pays, with the same results up to rounding (by the reference,
            and without `fixed_split`; a GPU's plan is for whole rows).
        num_kv_heads: Hkv (of a `KVCache`: `cache.num_kv_heads`). None: as many as pages hold, if
            they do not hold them in pairs.
        implementation: a name, names to try in order, or None for the target's best.
        return_lse: also return the log-sum-exp of the scores (the sink included).
        fixed_split: tokens, a multiple of 64: cut every row's tokens at its multiples, so that no
            bit of a row's result depends on the other rows, at some cost. None: a GPU cuts where
            its multiprocessors get equal work. (The reference never cuts.)
        schedule: from `attention_schedule`, where several layers share it; None: made here.

    Returns:
        o [T, Hq, D] in q's dtype; with `return_lse`, `(o, lse)` with lse f32[T, Hq]. Padding tokens
        and tokens that see nothing give 0 and -inf.

    Raises:
        ValueError: a shape or a value does not fit; the message says which and what to do.
        TypeError: a dtype or a type does not fit.
        NotImplementedError: none of the implementations asked for can serve this.

    Example:
        >>> import jax.numpy as jnp
        >>> pages = jnp.ones((4, 1, 16, 8))  # 4 pages, 1 head, 16 tokens per page, head_dim 8
        >>> o = paged_attention(
        ...     jnp.ones((3, 2, 8)), pages, pages,
        ...     block_tables=jnp.array([[2, 0], [1, 4]], jnp.int32),
        ...     kv_lens=jnp.array([20, 5], jnp.int32),  # row 0: pages 2 and 0; row 1: page 1
        ...     cu_q_lens=jnp.array([0, 1, 3], jnp.int32),  # 1 new token in row 0, 2 in row 1
        ... )
        >>> o.shape
        (3, 2, 8)
    """
    request = checks.check(
        q, k_pages, v_pages,
        block_tables=block_tables, kv_lens=kv_lens, cu_q_lens=cu_q_lens, layer=layer,
        max_q_len=max_q_len, sm_scale=sm_scale, causal=causal, sliding_window=sliding_window,
        soft_cap=soft_cap, sinks=sinks, k_scales=k_scales, v_scales=v_scales, ancestors=ancestors,
        num_kv_heads=num_kv_heads, return_lse=return_lse,
    )  # fmt: skip
    sliding_window = _typed(sliding_window, np.int32)
    if schedule is None:
        schedule = choice.schedule(
            request, q, implementation,
            block_tables=block_tables, kv_lens=kv_lens, cu_q_lens=cu_q_lens,
            sliding_window=sliding_window, fixed_split=checks.check_split(fixed_split),
        )  # fmt: skip
    elif fixed_split is not None:
        raise ValueError(f"{fixed_split=} belongs to the schedule: pass it to attention_schedule")
    else:
        choice.check_schedule(schedule, request, implementation, target_of(q))
    options: dict[str, Any] = dict(
        block_tables=block_tables,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        layer=_typed(layer, np.int32),
        sm_scale=_typed(q.shape[-1] ** -0.5 if sm_scale is None else sm_scale, np.float32),
        sliding_window=sliding_window,
        sinks=sinks,
        max_q_len=request.max_q_len,
        causal=causal,
        soft_cap=soft_cap,
    )
    # Implementations that decline these need not know the words.
    rare = dict(ancestors=ancestors, k_scales=k_scales, v_scales=v_scales)
    options |= {name: x for name, x in rare.items() if x is not None}
    run = partial(choice.run, schedule)
    if request.paired and num_kv_heads is not None:  # (it was checked to be)
        run = partial(attend_pairs, run, num_kv_heads=num_kv_heads)
    # A plan that was made for this batch serves no other, and what rows share is not fixed.
    if shared is not None and schedule.plan is None and schedule.fixed_split is None:
        o, lse = attend_shared(run, q, k_pages, v_pages, shared=shared, **options)
    else:
        o, lse = run(q, k_pages, v_pages, **options)
    return (o, lse) if return_lse else o


def _typed(x: Any, dtype: Any) -> Any:
    """Python numbers become typed, so that `8` and `jnp.int32(8)` share one compilation."""
    return dtype(x) if isinstance(x, int | float) else x


def paged_attention_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    layer: jax.Array | int | None = None,
    sm_scale: jax.Array | float | None = None,
    sliding_window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    num_kv_heads: int | None = None,
    implementation: Names = None,
    return_lse: bool = False,
    fixed_split: int | None = None,
    schedule: AttentionSchedule | None = None,
) -> Any:
    """`paged_attention` for one new token in every row.

    Args:
        q: [R, Hq, D], the query of row `r`'s last stored token. Rows with `kv_lens[r] == 0` are
            idle and give 0.
        k_pages: as in `paged_attention`.
        v_pages: same.
        block_tables: i32[R, M].
        kv_lens: i32[R], the new token included.
        layer: as in `paged_attention`.
        sm_scale: same.
        sliding_window: same.
        soft_cap: same.
        sinks: same.
        k_scales: same.
        v_scales: same.
        num_kv_heads: same.
        implementation: same.
        return_lse: same.
        fixed_split: same.
        schedule: same (made with `max_q_len=1` and `cu_q_lens` 0, 1, ..., R).

    Returns:
        o [R, Hq, D]; with `return_lse`, `(o, lse)` with lse f32[R, Hq].

    Raises:
        ValueError: as `paged_attention`.
        TypeError: same.
        NotImplementedError: same.
    """
    checks.check_decode(q, block_tables)
    return paged_attention(
        q,
        k_pages,
        v_pages,
        block_tables=block_tables,
        kv_lens=kv_lens,
        cu_q_lens=jnp.arange(q.shape[0] + 1, dtype=jnp.int32),
        layer=layer,
        max_q_len=1,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        k_scales=k_scales,
        v_scales=v_scales,
        num_kv_heads=num_kv_heads,
        implementation=implementation,
        return_lse=return_lse,
        fixed_split=fixed_split,
        schedule=schedule,
    )


def attention_schedule(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    *,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    sliding_window: jax.Array | int | None = None,
    implementation: Names = None,
    fixed_split: int | None = None,
    **options: Any,
) -> AttentionSchedule:
    """Divides the work of a step's attention, once for all layers that share a sliding window.

    A scan over layers would otherwise divide it anew in each of them.

    Args:
        q: as in `paged_attention`, or its `jax.ShapeDtypeStruct`: only shapes are looked at.
        k_pages: same.
        v_pages: same.
        block_tables: as in `paged_attention`.
        kv_lens: same.
        cu_q_lens: same.
        sliding_window: same.
        implementation: same.
        fixed_split: same.
        **options: other arguments of `paged_attention`; `max_q_len` and `causal` matter.

    Returns:
        What `paged_attention` takes as `schedule`, a pytree.

    Raises:
        ValueError: as `paged_attention`.
        TypeError: same.
        NotImplementedError: same.
    """
    batch: dict[str, Any] = dict(block_tables=block_tables, kv_lens=kv_lens, cu_q_lens=cu_q_lens)
    request = checks.check(q, k_pages, v_pages, **batch, sliding_window=sliding_window, **options)
    return choice.schedule(
        request, q, implementation, **batch,
        sliding_window=_typed(sliding_window, np.int32),
        fixed_split=checks.check_split(fixed_split),
    )  # fmt: skip


def explain(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    *,
    implementation: Names = None,
    **options: Any,
) -> Explanation:
    """Tells which implementation `paged_attention` would choose, and every reason.

    Nothing runs, so `jax.ShapeDtypeStruct`s serve as well as arrays. Warns of nothing.

    Args:
        q: as in `paged_attention`.
        k_pages: same.
        v_pages: same.
        implementation: same.
        **options: every other argument of `paged_attention`.

    Returns:
        The choice; `implementation` is None where `paged_attention` would raise
        NotImplementedError.

    Raises:
        ValueError: as `paged_attention`.
        TypeError: same.
    """
    checks.check_split(options.pop("fixed_split", None))
    options.pop("schedule", None)
    request = checks.check(q, k_pages, v_pages, **options)
    return choice.consider(request, target_of(q), implementation)
