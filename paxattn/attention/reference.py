"""Paged attention in plain `jax.numpy`: the oracle for the kernels, and what a CPU runs.

One core (`tiles.attend_tiles`), two drivers. Rows with few queries (decode, short speculation) form
one batch with a tile per row. Longer rows (prefill) are cut into tiles of `block_q` queries, each
walked over its own extent of the sequence in a loop whose length is the number of live tiles. A
ragged batch that holds both kinds sends each row where it belongs, and skips the driver that has
nothing to do.

The whole is differentiable with respect to queries, pages and sinks (flash-style: the backward pass
recomputes probabilities; `while_loop` itself has no reverse mode); quantised pages are constants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from paxattn.attention import cut
from paxattn.attention.cut import Batch, Config, default_config
from paxattn.attention.tiles import attend_tiles, attend_tiles_backward
from paxattn.attention.walk import Masking
from paxattn.page_table.pages import varying_like
from paxattn.target import target_of


def run(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """The implementation named "reference": `paged_attention_reference` with the config chosen.

    Args:
        q: [T, Hq, D].
        k_pages: [L, N, Hkv, P, D], or [N, Hkv, P, D] without `layer`.
        v_pages: same.
        **options: the other arguments of `paged_attention_reference`.

    Returns:
        o and lse.
    """
    heads, page_size, head_dim = k_pages.shape[-3:]
    config = cut.choose_config(
        device=target_of(q).device_kind,
        dtype=q.dtype.name,
        max_q_len=options["max_q_len"],
        num_rows=options["kv_lens"].shape[0],
        num_q_heads=q.shape[1],
        num_kv_heads=heads,
        head_dim=head_dim,
        page_size=page_size,
        page_dtype=None if options.get("k_scales") is None else k_pages.dtype.name,
    )
    attend = _in_auto_mode(functools.partial(paged_attention_reference, config=config), q)
    return attend(q, k_pages, v_pages, **options)


def _in_auto_mode(attend: Callable, q: jax.Array) -> Callable:
    """Leaves it to XLA how the inside is sharded, where a mesh has axes of type Explicit.

    The results are sharded like `q`: over heads, if the pages are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return attend
    spec = jax.typeof(q).sharding.spec

    def run(q: jax.Array, *pages: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
        # Static options cannot be arguments of `auto_axes`, which are arrays.
        arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
        static = {name: x for name, x in options.items() if name not in arrays}
        return jax.sharding.auto_axes(
            lambda q, pages, arrays: attend(q, *pages, **arrays, **static),
            axes=mesh.explicit_axes,
            out_sharding=(P(*spec), P(*spec[:2])),
        )(q, pages, arrays)

    return run


@functools.partial(jax.jit, static_argnames=("max_q_len", "causal", "soft_cap", "config"))
def paged_attention_reference(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    layer: jax.Array | int | None,
    sm_scale: jax.Array | float,
    sliding_window: jax.Array | int,
    sinks: jax.Array | None,
    max_q_len: int,
    causal: bool,
    soft_cap: float | None,
    ancestors: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The implementation named "reference". Arguments are as `api.paged_attention` leaves them.

    Args:
        q: [T, Hq, D].
        k_pages: [L, N, Hkv, P, D], or [N, Hkv, P, D] without `layer`. On CPUs, jax 0.10 reads
            bf16 through an f32 copy of the whole pool: use f32 or f16 there.
        v_pages: same.
        block_tables: i32[R, M].
        kv_lens: i32[R], tokens stored per row, this step's included.
        cu_q_lens: i32[R + 1].
        layer: i32[] or None.
        sm_scale: factor on `q . k`.
        sliding_window: i32[]; not positive: none.
        sinks: f32[Hq] or None.
        max_q_len: bound of the rows' query counts.
        causal: whether a query is blind to later positions.
        soft_cap: `cap * tanh(s / cap)` on scaled scores, or None.
        ancestors: u32[T] or None.
        k_scales: [L, N, Hkv, P], or [N, Hkv, P] without `layer`, of quantised pages; or None.
        v_scales: same.
        config: block sizes; None: `default_config`.

    Returns:
        o [T, Hq, D] in q's dtype, lse f32[T, Hq].
    """
    pages = k_pages, v_pages
    scales = None if k_scales is None or v_scales is None else (k_scales, v_scales)
    if scales is not None:
        pages, scales = _without_gradient((pages, scales))
    if layer is None:
        (pages, scales), layer = jax.tree.map(lambda x: x[None], (pages, scales)), 0
    k_pages, v_pages = pages
    if config is None:
        config = default_config(
            num_rows=kv_lens.shape[0],
            num_q_heads=q.shape[1],
            num_kv_heads=k_pages.shape[2],
            head_dim=q.shape[2],
            max_q_len=max_q_len,
        )
    room = block_tables.shape[1] * k_pages.shape[3]
    batch = Batch(
        block_tables=block_tables,
        kv_lens=jnp.clip(kv_lens, 0, min(room, 2**31 - 1)),  # no row holds more
        cu_q_lens=cu_q_lens,
        layer=jnp.clip(jnp.asarray(layer, jnp.int32), 0, k_pages.shape[0] - 1),
        window=jnp.asarray(sliding_window, jnp.int32),
        ancestors=ancestors,
        scales=scales,
        max_q_len=max_q_len,
        masking=Masking(causal=causal, soft_cap=soft_cap),
        config=config,
    )
    scaled = q.astype(jnp.float32) * jnp.asarray(sm_scale, jnp.float32)
    arrays = scaled, k_pages, v_pages, batch
    leaves = jax.tree.leaves(arrays)
    o, lse = _attend(*jax.tree.map(lambda x: varying_like(x, *leaves), arrays))
    if sinks is not None:
        o, lse = add_sinks(o, lse, sinks.astype(jnp.float32))
    return o.astype(q.dtype), lse


def add_sinks(o: jax.Array, lse: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lets each head's sink join the softmax's denominator (where there is anything to see)."""
    empty = lse == -jnp.inf
    known = jnp.where(empty, 0.0, lse)
    o = jnp.where(empty[..., None], 0.0, o * jax.nn.sigmoid(known - sinks)[..., None])
    return o, jnp.where(empty, -jnp.inf, jnp.logaddexp(known, sinks))


@jax.custom_jvp
def _without_gradient(pages: Any) -> Any:
    """Quantised pages and scales as they are; a gradient with respect to them is refused."""
    return pages


@_without_gradient.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "quantised pages have no gradient: keep pages in a float dtype to train through them, or "
        "stop the gradient before they are written (jax.lax.stop_gradient)"
    )


@jax.custom_vjp
def _attend(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Both drivers, without sinks: scaled f32[T, Hq, D] -> o f32[T, Hq, D], lse f32[T, Hq]."""
    o = varying_like(jnp.zeros(q.shape, jnp.float32), q)
    lse = varying_like(jnp.full(q.shape[:2], -jnp.inf, jnp.float32), q)
    if batch.short(q.shape[0]):
        return _rows_forward(q, k_pages, v_pages, batch, batch.q_lens > 0, batch.max_q_len, o, lse)
    if not batch.masking.causal:  # prefixes that rows share: hardly ever a single query
        return _tiles_forward(q, k_pages, v_pages, batch, o, lse)
    single = batch.q_lens == 1
    o, lse = lax.cond(
        single.any(),
        lambda o, lse: _rows_forward(q, k_pages, v_pages, batch, single, 1, o, lse),
        lambda o, lse: (o, lse),
        o,
        lse,
    )
    return _tiles_forward(q, k_pages, v_pages, batch, o, lse)


def _attend_fwd(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, batch: Batch
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    o, lse = _attend(q, k_pages, v_pages, batch)
    return (o, lse), (q, k_pages, v_pages, batch, o, lse)


def _attend_bwd(residuals: tuple, cotangents: tuple[jax.Array, jax.Array]) -> tuple:
    q, k_pages, v_pages, batch, o, lse = residuals
    do, dlse = cotangents
    # What saw nothing (padding too) is constant: whatever its cotangent is, it ends here.
    saw = lse > -jnp.inf
    do = jnp.where(saw[..., None], do, 0.0)
    delta = jnp.where(saw, (o * do).sum(axis=-1) - dlse, 0.0)
    known = q, k_pages, v_pages, lse, do, delta
    # Accumulated in f32, and as large as the pools: a page may be shared by many rows.
    pools = (k_pages, v_pages) if batch.scales is None else (None, None)
    grads = jax.tree.map(lambda x: varying_like(jnp.zeros(x.shape, jnp.float32), q), (q, *pools))
    if batch.short(q.shape[0]):
        grads = _rows_backward(known, grads, batch, batch.q_lens > 0, batch.max_q_len)
    else:
        single = batch.q_lens == 1
        if batch.masking.causal:
            grads = lax.cond(
                single.any(),
                lambda grads: _rows_backward(known, grads, batch, single, 1),
                lambda grads: grads,
                grads,
            )
        grads = _tiles_backward(known, grads, batch)
    dq, dk, dv = grads
    dk, dv = jax.tree.map(lambda x: x.astype(k_pages.dtype), (dk, dv))
    return dq, dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _options(batch: Batch, k_pages: jax.Array, block_kv: int) -> dict:
    """The keyword arguments that all calls of the core share."""
    page_size = k_pages.shape[3]
    return dict(
        layer=batch.layer,
        window=batch.window,
        masking=batch.masking,
        scales=batch.scales,
        pages=min(max(block_kv // page_size, 1), batch.block_tables.shape[1]),
    )


def _rows_forward(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    batch: Batch,
    chosen: jax.Array,
    block_q: int,
    o: jax.Array,
    lse: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Fills in `o` and `lse` for the chosen rows (bool[R]), of at most `block_q` queries each."""
    tiles, tokens = cut.row_tiles(batch, chosen, block_q)
    options = _options(batch, k_pages, batch.config.short_block_kv)
    o_tiles, lse_tiles = attend_tiles(cut.take_rows(q, tokens), k_pages, v_pages, tiles, **options)
    return (
        cut.put_rows(o, o_tiles, batch, chosen),
        cut.put_rows(lse, lse_tiles, batch, chosen),
    )


def _rows_backward(
    known: tuple, grads: tuple, batch: Batch, chosen: jax.Array, block_q: int
) -> tuple:
    q, k_pages, v_pages, lse, do, delta = known
    dq, dk, dv = grads
    tiles, tokens = cut.row_tiles(batch, chosen, block_q)
    # Other rows' NaN, and padding's, must not enter a product.
    q, do, delta = (cut.where_live(tiles.live, cut.take_rows(x, tokens), 0.0)
                    for x in (q, do, delta))  # fmt: skip
    dq_tiles, dk, dv = attend_tiles_backward(
        q, k_pages, v_pages, tiles, cut.take_rows(lse, tokens), do, delta, dk, dv,
        **_options(batch, k_pages, batch.config.short_block_kv),
    )  # fmt: skip
    return cut.put_rows(dq, dq_tiles, batch, chosen), dk, dv


def _tiles_forward(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    batch: Batch,
    o: jax.Array,
    lse: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Fills in `o` and `lse` for the rows of two or more queries, tile after tile."""
    num_tokens = q.shape[0]
    block_q, ends = cut.count_tiles(batch, num_tokens)
    options = _options(batch, k_pages, batch.tile_blocks[1])
    most = min(batch.tile_blocks[2] // k_pages.shape[3], batch.block_tables.shape[1])
    options["whole_pages"] = max(most // options["pages"], 1) * options["pages"]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        o, lse = carry
        tile, start = cut.nth_tile(batch, i, block_q, ends, num_tokens)
        o_tile, lse_tile = attend_tiles(
            cut.take_window(q, start, block_q), k_pages, v_pages, tile, **options
        )
        return (
            cut.put_window(o, o_tile, tile.live, start),
            cut.put_window(lse, lse_tile, tile.live, start),
        )

    return lax.fori_loop(0, ends[-1], step, (o, lse))


def _tiles_backward(known: tuple, grads: tuple, batch: Batch) -> tuple:
    q, k_pages, v_pages, lse, do, delta = known
    num_tokens = q.shape[0]
    block_q, ends = cut.count_tiles(batch, num_tokens)
    options = _options(batch, k_pages, batch.tile_blocks[1])

    def step(i: jax.Array, carry: tuple) -> tuple:
        dq, dk, dv = carry
        tile, start = cut.nth_tile(batch, i, block_q, ends, num_tokens)
        q_tile, do_tile, delta_tile = (
            cut.where_live(tile.live, cut.take_window(x, start, block_q), 0.0)
            for x in (q, do, delta)
        )
        lse_tile = cut.take_window(lse, start, block_q)
        dq_tile, dk, dv = attend_tiles_backward(
            q_tile, k_pages, v_pages, tile, lse_tile, do_tile, delta_tile, dk, dv, **options
        )
        return cut.put_window(dq, dq_tile, tile.live, start), dk, dv

    return lax.fori_loop(0, ends[-1], step, grads)
