"""What `paged_attention` accepts: every error that its arguments can cause.

Only shapes, dtypes and static values are looked at, so the checks run on arrays, tracers and
`jax.ShapeDtypeStruct`s alike, and cost nothing inside `jax.jit`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from paxattn.kv_cache import PAIRED_HEAD_DIM
from paxattn.quantized import SCALE_DTYPE, is_quantized

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is static about one call: all that an implementation may base a refusal on.

    Attributes:
        num_tokens: T, places in the ragged batch.
        num_rows: R.
        num_q_heads: Hq.
        num_kv_heads: Hkv, or pairs of them.
        head_dim: D, or that of a pair together.
        page_size: P, tokens.
        num_pages: N, per layer.
        max_pages_per_seq: M.
        num_layers: L, or None for pages of one layer.
        dtype: of queries, and of pages that are not quantised.
        max_q_len: bound on a row's new tokens.
        causal: whether queries are blind to later positions.
        window: whether a sliding window is given.
        soft_cap: whether scores are capped.
        sinks: whether sinks join the softmax.
        return_lse: whether the log-sum-exp is wanted.
        ancestors: whether new tokens form trees.
        page_dtype: of quantised pages, which have scales; None: pages hold floats as they are.
        paired: whether KV heads lie side by side in pairs, see `pairs`; only scales tell them
            apart.
    """

    num_tokens: int
    num_rows: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int
    max_pages_per_seq: int
    num_layers: int | None
    dtype: str
    max_q_len: int
    causal: bool
    window: bool
    soft_cap: bool
    sinks: bool
    return_lse: bool
    ancestors: bool = False
    page_dtype: str | None = None
    paired: bool = False


def check(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    *,
    block_tables: Any,
    kv_lens: Any,
    cu_q_lens: Any,
    layer: Any = None,
    max_q_len: int | None = None,
    sm_scale: Any = None,
    causal: bool = True,
    sliding_window: Any = None,
    soft_cap: float | None = None,
    sinks: Any = None,
    k_scales: Any = None,
    v_scales: Any = None,
    ancestors: Any = None,
    shared: Any = None,
    num_kv_heads: int | None = None,
    return_lse: bool = False,
) -> Request:
    """Validates the arguments of `paged_attention` and returns what is static about them.

    Args:
        q: as in `paged_attention`, like all the others.
        k_pages: same.
        v_pages: same.
        block_tables: same.
        kv_lens: same.
        cu_q_lens: same.
        layer: same.
        max_q_len: same.
        sm_scale: same.
        causal: same.
        sliding_window: same.
        soft_cap: same.
        sinks: same.
        k_scales: same.
        v_scales: same.
        ancestors: same.
        shared: same; any batch may be served without.
        num_kv_heads: same.
        return_lse: same.

    Returns:
        The request.

    Raises:
        ValueError: a shape or a value does not fit.
        TypeError: a dtype or a type does not fit.
    """
    num_tokens, num_q_heads, _ = _check_q(q)
    num_layers, num_pages, rows, page_size = _check_pages(q, k_pages, v_pages, layer)
    paired = k_pages.shape[-1] != q.shape[-1]
    num_kv_heads = _check_heads(k_pages, num_kv_heads, 2 * rows if paired else rows, paired)
    quantized = _check_scales(q, k_pages, v_pages, k_scales, v_scales)
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"{num_q_heads=} must be a multiple of {num_kv_heads=} (each KV head serves a whole "
            "number of query heads)"
        )
    num_rows, max_pages = _check_tables(block_tables, kv_lens, cu_q_lens)
    bound = _check_max_q_len(max_q_len, num_tokens)
    _check_numbers(layer, num_layers, sm_scale, soft_cap)
    _check_window(sliding_window, causal)
    if sinks is not None:
        _array("sinks", sinks)
        if sinks.shape != (num_q_heads,):
            raise ValueError(f"{sinks.shape=} must be ({num_q_heads},): one logit per query head")
        if not jnp.issubdtype(sinks.dtype, jnp.floating):
            raise TypeError(f"{sinks.dtype=} must be a float dtype")
    if ancestors is not None:
        _check_ancestors(ancestors, num_tokens, bound, causal)
    return Request(
        num_tokens=num_tokens,
        num_rows=num_rows,
        num_q_heads=2 * rows * (num_q_heads // num_kv_heads) if paired else num_q_heads,
        num_kv_heads=rows,
        head_dim=k_pages.shape[-1],
        page_size=page_size,
        num_pages=num_pages,
        max_pages_per_seq=max_pages,
        num_layers=num_layers,
        dtype=str(np.dtype(q.dtype)),
        max_q_len=bound,
        causal=causal,
        window=sliding_window is not None,
        soft_cap=soft_cap is not None,
        sinks=sinks is not None,
        return_lse=return_lse,
        ancestors=ancestors is not None,
        page_dtype=str(np.dtype(k_pages.dtype)) if quantized else None,
        paired=paired,
    )


def check_decode(q: Any, block_tables: Any) -> None:
    """Validates that there is one query per row.

    Args:
        q: [R, Hq, D].
        block_tables: i32[R, M].

    Raises:
        ValueError: the numbers differ.
        TypeError: not arrays.
    """
    _array("q", q)
    _array("block_tables", block_tables)
    if q.ndim != 3 or block_tables.ndim != 2 or q.shape[0] != block_tables.shape[0]:
        raise ValueError(
            f"{q.shape=} must be [rows, num_q_heads, head_dim] with one query for each row of "
            f"{block_tables.shape=}; for other numbers of new tokens use paged_attention"
        )


def check_split(fixed_split: int | None) -> int | None:
    """Validates the size of pieces that do not depend on the batch, and returns it.

    Args:
        fixed_split: tokens, or None.

    Raises:
        ValueError: it is not a positive multiple of 64.
        TypeError: it is not a Python int.
    """
    if fixed_split is None:
        return None
    if isinstance(fixed_split, bool) or not isinstance(fixed_split, int | np.integer):
        raise TypeError(
            f"fixed_split must be a Python int, not {type(fixed_split).__name__}: it is static"
        )
    if fixed_split < 1 or fixed_split % 64:
        raise ValueError(f"{fixed_split=} must be a positive multiple of 64 tokens")
    return int(fixed_split)


def _array(name: str, x: Any) -> None:
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(f"{name} must be an array, not {type(x).__name__}: wrap it in jnp.asarray")


def _check_q(q: Any) -> tuple[int, int, int]:
    _array("q", q)
    if len(q.shape) != 3 or 0 in q.shape:
        raise ValueError(f"{q.shape=} must be [tokens, num_q_heads, head_dim], none of them 0")
    if str(np.dtype(q.dtype)) not in _DTYPES:
        raise TypeError(f"{q.dtype=} must be one of {', '.join(_DTYPES)}")
    return q.shape


def _check_pages(
    q: Any, k_pages: Any, v_pages: Any, layer: Any
) -> tuple[int | None, int, int, int]:
    """Returns num_layers (None for pages of one layer), num_pages, heads or pairs, page_size."""
    _array("k_pages", k_pages)
    _array("v_pages", v_pages)
    shape = tuple(k_pages.shape)
    if len(shape) not in (4, 5) or 0 in shape:
        raise ValueError(
            f"{k_pages.shape=} must be [num_pages, num_kv_heads, page_size, head_dim], or with "
            "layer= [num_layers, num_pages, num_kv_heads, page_size, head_dim], none of them 0"
        )
    if tuple(v_pages.shape) != shape:
        raise ValueError(f"{v_pages.shape=} must equal {k_pages.shape=}")
    if len(shape) == 4 and layer is not None:
        raise ValueError(
            f"{layer=} was given with pages of one layer, {k_pages.shape=}: drop layer=, or pass "
            "the pages of all layers, [num_layers, ...]"
        )
    if len(shape) == 5 and layer is None:
        raise ValueError(
            f"{k_pages.shape=} holds the pages of {shape[0]} layers: say which with layer="
        )
    pair = 2 * PAIRED_HEAD_DIM
    if shape[-1] != q.shape[-1] and (q.shape[-1], shape[-1]) != (PAIRED_HEAD_DIM, pair):
        raise ValueError(f"head_dim of {q.shape=} and of {k_pages.shape=} must be equal")
    num_pages, rows, page_size, _ = shape[-4:]
    return shape[0] if len(shape) == 5 else None, num_pages, rows, page_size


def _check_heads(k_pages: Any, num_kv_heads: int | None, held: int, paired: bool) -> int:
    """Returns how many KV heads there are: as many as pages hold, or one less of pairs."""
    if num_kv_heads is None and paired:
        raise ValueError(
            f"{k_pages.shape=} holds heads of {PAIRED_HEAD_DIM} in pairs, the last of which may "
            "have one only: say how many with num_kv_heads= (of a KVCache: cache.num_kv_heads)"
        )
    if num_kv_heads is None or num_kv_heads == held or (paired and num_kv_heads == held - 1):
        return held if num_kv_heads is None else num_kv_heads
    raise ValueError(f"{num_kv_heads=} must be {held}, the heads of {k_pages.shape=}")


def _check_scales(q: Any, k_pages: Any, v_pages: Any, k_scales: Any, v_scales: Any) -> bool:
    """Whether pages are quantised: then they need scales, and else q's dtype."""
    quantized = is_quantized(k_pages.dtype) or is_quantized(v_pages.dtype)
    if quantized and k_pages.dtype != v_pages.dtype:
        raise TypeError(
            f"v_pages has dtype {v_pages.dtype}, k_pages has {k_pages.dtype}: quantise both alike"
        )
    for side, pages, scales in (("k", k_pages, k_scales), ("v", v_pages, v_scales)):
        if not quantized:
            if pages.dtype != q.dtype:
                raise TypeError(
                    f"{side}_pages has dtype {pages.dtype}, q has {q.dtype}: cast q (it is the "
                    "smaller)"
                )
            if scales is not None:
                raise TypeError(
                    f"{side}_scales= goes with quantised pages, {side}_pages has dtype "
                    f"{pages.dtype}: leave it out"
                )
            continue
        if scales is None:
            raise TypeError(
                f"{side}_pages has dtype {pages.dtype}: its numbers mean nothing without "
                f"{side}_scales= (of a KVCache: cache.{side}_scales)"
            )
        _array(f"{side}_scales", scales)
        *outer, rows, page_size, size = pages.shape
        expected = (*outer, rows * (size // q.shape[-1]), page_size)
        if tuple(scales.shape) != expected:
            raise ValueError(
                f"{side}_scales has shape {tuple(scales.shape)}, must be {expected}: one for each "
                f"token and head of {side}_pages"
            )
        if scales.dtype != SCALE_DTYPE:
            raise TypeError(
                f"{side}_scales has dtype {scales.dtype}, must be {SCALE_DTYPE}, as it was rounded "
                "when the numbers were divided by it: see quantized.quantize"
            )
    return quantized


def _check_tables(block_tables: Any, kv_lens: Any, cu_q_lens: Any) -> tuple[int, int]:
    for name, x in (
        ("block_tables", block_tables), ("kv_lens", kv_lens), ("cu_q_lens", cu_q_lens)
    ):  # fmt: skip
        _array(name, x)
        if x.dtype != np.int32:
            raise TypeError(f"{name} has dtype {x.dtype}, must be int32: {name}.astype(jnp.int32)")
    if len(block_tables.shape) != 2 or 0 in block_tables.shape:
        raise ValueError(f"{block_tables.shape=} must be [rows, max_pages_per_seq], neither 0")
    rows = block_tables.shape[0]
    if tuple(kv_lens.shape) != (rows,):
        raise ValueError(
            f"{kv_lens.shape=} must be ({rows},): one length per row of {block_tables.shape=}"
        )
    if tuple(cu_q_lens.shape) != (rows + 1,):
        raise ValueError(
            f"{cu_q_lens.shape=} must be ({rows + 1},): a running sum of new tokens that starts "
            f"with 0, over the rows of {block_tables.shape=}"
        )
    return block_tables.shape


def _check_max_q_len(max_q_len: int | None, num_tokens: int) -> int:
    if max_q_len is None:
        return num_tokens
    if isinstance(max_q_len, bool) or not isinstance(max_q_len, int | np.integer):
        raise TypeError(
            f"max_q_len must be a Python int, not {type(max_q_len).__name__}: it is static"
        )
    if max_q_len < 1:
        raise ValueError(f"{max_q_len=} must be at least 1 (None means the number of tokens)")
    return min(int(max_q_len), num_tokens)


def _check_numbers(layer: Any, num_layers: int | None, sm_scale: Any, soft_cap: Any) -> None:
    if isinstance(layer, bool | float):
        raise TypeError(f"{layer=} must be an int or an i32[] array")
    if isinstance(layer, int | np.integer):
        if num_layers is not None and not 0 <= layer < num_layers:
            raise ValueError(f"{layer=} must be in [0, {num_layers}), the layers that pages hold")
    elif layer is not None:
        _scalar("layer", layer)
    if isinstance(sm_scale, int | float | np.number):
        if not (math.isfinite(sm_scale) and sm_scale > 0):
            raise ValueError(f"{sm_scale=} must be positive and finite (None: head_dim ** -0.5)")
    elif sm_scale is not None and getattr(sm_scale, "shape", None) != ():
        raise TypeError(f"sm_scale must be a number, not {type(sm_scale).__name__}")
    if soft_cap is None:
        return
    if isinstance(soft_cap, bool) or not isinstance(soft_cap, int | float | np.floating):
        raise TypeError(
            f"soft_cap must be a Python float, not {type(soft_cap).__name__}: it is static"
        )
    if not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ValueError(f"{soft_cap=} must be positive and finite (None means no cap)")


def _check_window(sliding_window: Any, causal: bool) -> None:
    if not isinstance(causal, bool | np.bool_):
        raise TypeError(f"causal must be a Python bool, not {type(causal).__name__}: it is static")
    if sliding_window is None:
        return
    if not causal:
        raise ValueError(
            f"{sliding_window=} needs causal=True: the window ends at the query's own position"
        )
    if isinstance(sliding_window, bool | float):
        raise TypeError(f"{sliding_window=} must be an int or an i32[] array")
    if isinstance(sliding_window, int | np.integer):
        if not 0 < sliding_window < 2**31:
            raise ValueError(
                f"{sliding_window=} must be at least 1 token, and an int32 (None means no window)"
            )
    else:
        _scalar("sliding_window", sliding_window)


def _check_ancestors(ancestors: Any, num_tokens: int, max_q_len: int, causal: bool) -> None:
    _array("ancestors", ancestors)
    if tuple(ancestors.shape) != (num_tokens,) or ancestors.dtype != np.uint32:
        raise ValueError(
            f"ancestors is {ancestors.dtype}{list(ancestors.shape)}, must be "
            f"uint32[{num_tokens}]: a bit mask for each token of q"
        )
    if max_q_len > 32:
        raise ValueError(
            f"{max_q_len=} with ancestors= must be at most 32, the bits of a mask: pass max_q_len="
        )
    if not causal:
        raise ValueError(f"{causal=} does not go with ancestors=, which say what is seen")


def _scalar(name: str, x: Any) -> None:
    _array(name, x)
    if tuple(x.shape) != () or not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be an int or an i32[] array, got {x.dtype}{list(x.shape)}")
