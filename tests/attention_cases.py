"""The cases that every implementation of `paged_attention` is tested and measured with.

A case is plain data. `make` turns it into arrays (NumPy, so that nothing compiles), `oracle`
answers it densely in float64, one sequence at a time, and `poison` fills every slot that no
sequence owns.
`SMALL` runs by default; `full_grid()` takes minutes to hours.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}  # of outputs of size about 1
# Quantised pages: the format, its largest number, and what it costs: the largest error of outputs
# of numbers from a normal distribution, against attention over those before they were quantised.
# (Against attention over what the pages hold, TOLERANCE is the bound.)
QUANTIZED = {
    "float8_e4m3fn": (np.dtype(ml_dtypes.float8_e4m3fn), 448.0, 0.12),
    "int8": (np.dtype(np.int8), 127.0, 0.03),
}
SCALE_DTYPE = np.dtype(ml_dtypes.bfloat16)
LSE_TOLERANCE = 2e-5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: rows of `q_lens` new tokens at the end of `kv_lens` stored ones."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: tuple[int, int] = (8, 2)  # query, KV
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    page_dtype: str | None = None  # of QUANTIZED; None: as dtype
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    layers: int | None = None  # None: pages of one layer
    padding: int = 0  # tokens after the last row's
    spare: int = 3  # entries of the block tables beyond the longest row's
    max_q_len: int | None = None

    def __str__(self) -> str:
        rows = [f"{q}of{kv}" for q, kv in zip(self.q_lens, self.kv_lens, strict=True)]
        rows = rows if len(rows) <= 4 else [*rows[:3], f"x{len(rows)}"]
        out = ["+".join(rows), "h{}k{}d{}".format(*self.heads, self.head_dim), f"p{self.page_size}"]
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in (
            "dtype",
            "page_dtype",
            "causal",
            "window",
            "soft_cap",
            "sinks",
            "layers",
            "padding",
        ):
            if getattr(self, name) != defaults[name]:
                out.append(f"{name}={getattr(self, name)}")
        return "-".join(out)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A case's arrays (NumPy), and `owned`: bool[N, P], the slots that hold a row's token.

    `exact` are K and V before they were quantised, if they were; `num_kv_heads` is given where
    pages hold heads in pairs.
    """

    case: Case
    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    block_tables: np.ndarray
    kv_lens: np.ndarray
    cu_q_lens: np.ndarray
    sinks: np.ndarray | None
    owned: np.ndarray
    k_scales: np.ndarray | None = None
    v_scales: np.ndarray | None = None
    exact: tuple[np.ndarray, np.ndarray] | None = None
    num_kv_heads: int | None = None

    @property
    def layer(self) -> int | None:
        return None if self.case.layers is None else self.case.layers - 1

    @property
    def options(self) -> dict:
        """Every keyword argument of `paged_attention` but `implementation` and `return_lse`."""
        scales = dict(k_scales=self.k_scales, v_scales=self.v_scales)
        return dict(
            **({} if self.k_scales is None else scales),
            block_tables=self.block_tables,
            kv_lens=self.kv_lens,
            cu_q_lens=self.cu_q_lens,
            layer=self.layer,
            max_q_len=self.case.max_q_len,
            causal=self.case.causal,
            sliding_window=self.case.window,
            soft_cap=self.case.soft_cap,
            sinks=self.sinks,
            **({} if self.num_kv_heads is None else dict(num_kv_heads=self.num_kv_heads)),
        )


def make(case: Case, seed: int = 0) -> Inputs:
    """Draws a case's arrays: pages in random order, the sentinel where there is none."""
    rng = np.random.default_rng(seed)
    dtype, (num_q_heads, num_kv_heads) = DTYPES[case.dtype], case.heads
    held = [-(-n // case.page_size) for n in case.kv_lens]
    num_pages = sum(held) + 5
    tables = np.full((len(held), max(held) + case.spare), num_pages, np.int32)
    owned = np.zeros((num_pages, case.page_size), bool)
    pages = iter(rng.permutation(num_pages))
    for row, n in enumerate(case.kv_lens):
        for i in range(held[row]):
            tables[row, i] = next(pages)
            owned[tables[row, i], : n - i * case.page_size] = True
    shape = (num_pages, num_kv_heads, case.page_size, case.head_dim)
    shape = shape if case.layers is None else (case.layers, *shape)
    tokens = sum(case.q_lens) + case.padding
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    inputs = Inputs(
        case=case,
        q=draw(tokens, num_q_heads, case.head_dim).astype(dtype),
        k_pages=draw(*shape).astype(dtype),
        v_pages=draw(*shape).astype(dtype),
        block_tables=tables,
        kv_lens=np.asarray(case.kv_lens, np.int32),
        cu_q_lens=np.cumsum([0, *case.q_lens], dtype=np.int32),
        sinks=draw(num_q_heads) if case.sinks else None,
        owned=owned,
    )
    return inputs if case.page_dtype is None else quantized(inputs)


def quantized(inputs: Inputs) -> Inputs:
    """The same with K and V in the case's `page_dtype`."""
    (k, k_scales), (v, v_scales) = (
        quantize(x, inputs.case.page_dtype) for x in (inputs.k_pages, inputs.v_pages)
    )
    return dataclasses.replace(
        inputs, k_pages=k, v_pages=v, k_scales=k_scales, v_scales=v_scales,
        exact=(inputs.k_pages, inputs.v_pages),
    )  # fmt: skip


def quantize(x: np.ndarray, page_dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scales, one for all but the last axis of `x`."""
    dtype, largest, _ = QUANTIZED[page_dtype]
    wide = x.astype(np.float32)
    scales = (np.abs(wide).max(axis=-1) / np.float32(largest)).astype(SCALE_DTYPE)
    numbers = np.clip(wide / scales.astype(np.float32)[..., None], -largest, largest)
    return (np.rint(numbers) if page_dtype == "int8" else numbers).astype(dtype), scales


def exact(inputs: Inputs) -> Inputs:
    """The same before K and V were quantised."""
    k, v = inputs.exact
    return dataclasses.replace(inputs, k_pages=k, v_pages=v, k_scales=None, v_scales=None)


def rounded(inputs: Inputs) -> Inputs:
    """The same with pages of floats: what quantised numbers stand for, in the case's dtype."""
    if inputs.k_scales is None:
        return inputs

    def restore(pages: np.ndarray, scales: np.ndarray) -> np.ndarray:
        exact = pages.astype(np.float32) * scales.astype(np.float32)[..., None]
        return exact.astype(DTYPES[inputs.case.dtype])

    k, v = restore(inputs.k_pages, inputs.k_scales), restore(inputs.v_pages, inputs.v_scales)
    return dataclasses.replace(inputs, k_pages=k, v_pages=v, k_scales=None, v_scales=None)


def paired(inputs: Inputs) -> Inputs:
    """The same with heads of 64 side by side in pairs; zeros beside the last of an odd number."""

    def pair(pages: np.ndarray, axis: int = -3) -> np.ndarray:
        odd = [(0, 0)] * pages.ndim
        odd[axis] = (0, pages.shape[axis] % 2)
        pages = np.pad(pages, odd)
        if axis == -2:  # scales
            return pages
        *outer, heads, size, dim = pages.shape
        pages = pages.reshape(*outer, heads // 2, 2, size, dim)
        return np.moveaxis(pages, -3, -2).reshape(*outer, heads // 2, size, 2 * dim)

    scales = (None if x is None else pair(x, -2) for x in (inputs.k_scales, inputs.v_scales))
    return dataclasses.replace(
        inputs, k_pages=pair(inputs.k_pages), v_pages=pair(inputs.v_pages), k_scales=next(scales),
        v_scales=next(scales), num_kv_heads=inputs.case.heads[1],
    )  # fmt: skip


def leave_behind(inputs: Inputs) -> Inputs:
    """Takes the pages away that no query's sliding window reaches."""
    case, tables, owned = inputs.case, inputs.block_tables.copy(), inputs.owned.copy()
    for row, (new, held) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        behind = max(held - new - case.window + 1, 0) // case.page_size
        owned[tables[row, :behind]] = False
        tables[row, :behind] = len(owned)
    return dataclasses.replace(inputs, block_tables=tables, owned=owned)


def scatter(inputs: Inputs, num_pages: int = 40_000) -> Inputs:
    """The same pages of floats, anywhere beyond page 32,767 of a large pool that holds NaN."""
    places = np.random.default_rng(1).choice(
        np.arange(32_768, num_pages), len(inputs.owned), replace=False
    )

    def spread(pages: np.ndarray) -> np.ndarray:
        out = np.full((num_pages, *pages.shape[1:]), np.nan, pages.dtype)
        out[places] = pages
        return out

    return dataclasses.replace(
        inputs,
        block_tables=np.append(places, num_pages).astype(np.int32)[inputs.block_tables],
        k_pages=spread(inputs.k_pages),
        v_pages=spread(inputs.v_pages),
    )


def poison(inputs: Inputs, value: float = np.nan) -> Inputs:
    """Puts `value` in all that no row may read: other slots, other layers, padding queries.

    Integers, which have no NaN, get their lowest number, and their scales `value`.
    """

    def fill(pages: np.ndarray) -> np.ndarray:
        out = np.full_like(pages, -128 if pages.dtype == np.int8 else value)
        at = (...,) if inputs.layer is None else (inputs.layer,)
        mine = np.swapaxes(out[at], 1, 2)  # [N, P, H, ...] views
        mine[inputs.owned] = np.swapaxes(pages[at], 1, 2)[inputs.owned]
        return out

    q = inputs.q.copy()
    q[inputs.cu_q_lens[-1] :] = value
    names = ("k_pages", "v_pages", "k_scales", "v_scales")[: 4 if inputs.case.page_dtype else 2]
    return dataclasses.replace(inputs, q=q, **{name: fill(getattr(inputs, name)) for name in names})


def oracle(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The answer, o and lse, in float64."""
    case = inputs.case
    q = inputs.q.astype(np.float64) * case.head_dim**-0.5
    at = (...,) if inputs.layer is None else (inputs.layer,)
    k_pages, v_pages = (x[at].astype(np.float64) for x in (inputs.k_pages, inputs.v_pages))
    if inputs.k_scales is not None:
        k_pages *= inputs.k_scales[at].astype(np.float64)[..., None]
        v_pages *= inputs.v_scales[at].astype(np.float64)[..., None]
    o, lse = np.zeros_like(q), np.full(q.shape[:2], -np.inf)
    group = case.heads[0] // case.heads[1]
    for row, n in enumerate(inputs.kv_lens):
        tokens = slice(inputs.cu_q_lens[row], inputs.cu_q_lens[row + 1])
        pages = inputs.block_tables[row, : -(-n // case.page_size)]
        if not len(pages) or tokens.start == tokens.stop:
            continue
        k, v = (
            np.repeat(np.concatenate(x[pages], axis=1)[:, :n], group, axis=0)
            for x in (k_pages, v_pages)
        )
        s = np.einsum("qhd,hnd->hqn", q[tokens], k)
        if case.soft_cap is not None:
            s = case.soft_cap * np.tanh(s / case.soft_cap)
        position = n - (tokens.stop - tokens.start) + np.arange(tokens.stop - tokens.start)
        ago = position[:, None] - np.arange(n)
        seen = np.full(ago.shape, True)
        if case.causal:
            seen &= ago >= 0
        if case.window is not None:
            seen &= ago < case.window
        s = np.where(seen, s, -np.inf)
        if inputs.sinks is not None:
            sink = np.broadcast_to(inputs.sinks.astype(np.float64)[:, None, None], s[..., :1].shape)
            s = np.concatenate([s, sink], axis=-1)
        some = seen.any(axis=1)
        top = np.maximum(s.max(axis=-1, keepdims=True), -1e30)  # finite: a row may see nothing
        p = np.exp(s - top)
        total = np.maximum(p.sum(axis=-1, keepdims=True), 1e-30)
        o[tokens] = np.einsum("hqn,hnd->qhd", (p / total)[..., :n], v) * some[:, None, None]
        lse[tokens] = np.where(some, (top + np.log(total))[..., 0], -np.inf).T
    return o, lse


DECODE = dict(q_lens=(1, 1, 1), kv_lens=(523, 37, 2011))
MIXED = dict(q_lens=(1, 5, 129), kv_lens=(1328, 18, 463))
EDGES = dict(q_lens=(1, 0, 1, 1, 1, 0), kv_lens=(1, 0, 15, 16, 17, 40))  # around a page of 16

SMALL = (
    # decode: one tile per row
    Case(**DECODE),
    Case(**DECODE, heads=(4, 4), head_dim=80, window=128, layers=3),
    Case(**DECODE, heads=(5, 1), head_dim=128, dtype="bfloat16", soft_cap=50.0),
    Case(**DECODE, dtype="float16", sinks=True, page_size=128),
    Case(**EDGES, max_q_len=1, padding=2, layers=2, window=64),
    Case(q_lens=(1,), kv_lens=(300,), page_size=1, head_dim=96),
    Case(q_lens=(1, 1), kv_lens=(300, 255), page_size=256, head_dim=256),
    # a few new tokens per row (speculation)
    Case(q_lens=(5, 1, 0, 3), kv_lens=(18, 700, 0, 64), heads=(4, 4), sinks=True, soft_cap=30.0),
    Case(q_lens=(4, 4), kv_lens=(30, 5), causal=False, page_size=8, heads=(5, 1)),
    # ragged: long rows cut into tiles, single-token rows served together
    Case(**MIXED),
    Case(**MIXED, heads=(4, 4), page_size=5, window=64, padding=9, layers=2),
    Case(**MIXED, heads=(5, 1), head_dim=128, dtype="bfloat16", soft_cap=50.0, sinks=True),
    Case(**MIXED, causal=False, page_size=128),
    # (rows 4 and 5: queries before their sequence's start see nothing)
    Case(q_lens=(150, 0, 1, 9, 1, 9), kv_lens=(150, 0, 1, 17, 0, 5), window=1, padding=3),
    Case(q_lens=(64, 32), kv_lens=(256, 288), dtype="float16", head_dim=80),  # chunked prefill
    # quantised pages
    Case(**DECODE, page_dtype="float8_e4m3fn", max_q_len=1),
    Case(**EDGES, page_dtype="int8", dtype="bfloat16", max_q_len=1, padding=2, layers=2, window=64),
    Case(**MIXED, page_dtype="int8", heads=(4, 4), page_size=5, window=64, padding=9, layers=2),
    Case(
        **MIXED, page_dtype="float8_e4m3fn", heads=(5, 1), head_dim=128, dtype="bfloat16",
        soft_cap=50.0, sinks=True,
    ),
)  # fmt: skip


_LENS = (
    DECODE,
    MIXED,
    EDGES,
    dict(q_lens=(1, 3, 64, 3, 64), kv_lens=(339, 1024, 800, 799, 2048)),
    dict(q_lens=(1,) * 77, kv_lens=tuple(range(1, 78))),
    dict(q_lens=(129, 129), kv_lens=(1099, 1099)),
    dict(q_lens=(1,) * 24 + (3,) * 12, kv_lens=(100,) * 24 + (300,) * 12),
    dict(q_lens=(17,) * 4 + (1,) * 10, kv_lens=(600,) * 4 + (100,) * 10),
)


def full_grid() -> Iterator[Case]:
    """Every combination that the kernels must serve with pages of floats."""
    shapes = itertools.product(
        _LENS, ((4, 4), (8, 2), (5, 1), (14, 2)), (64, 80, 96, 128, 256), (1, 5, 8, 16, 128, 256)
    )
    options = itertools.cycle(
        dict(window=window, soft_cap=soft_cap, sinks=sinks, layers=layers)
        for sinks, layers, soft_cap, window in itertools.product(
            (False, True), (None, 2), (None, 50.0), (None, 64, 128, 256)
        )
    )
    dtypes = itertools.cycle(DTYPES)
    for (rows, heads, head_dim, page_size), more, dtype in zip(
        shapes, options, dtypes, strict=False
    ):
        yield Case(**rows, heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype, **more)
    for rows, heads, page_size in itertools.product(_LENS, ((4, 4), (8, 2)), (1, 16)):
        yield Case(**rows, heads=heads, page_size=page_size, causal=False, padding=7)


def quantized_grid() -> Iterator[Case]:
    """Combinations with quantised pages."""
    for rows, page_dtype, head_dim, page_size in itertools.product(
        _LENS, QUANTIZED, (64, 80, 128), (1, 16, 256)
    ):
        for dtype in DTYPES:
            yield Case(
                **rows, head_dim=head_dim, page_size=page_size, dtype=dtype, page_dtype=page_dtype
            )
