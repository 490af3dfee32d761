"""Who serves which rows of a batch, and in which order: made once per step, shared by its layers.

Rows whose packed query rows (new tokens x group) fit a tile of the decode kernel go there, the
others to the prefill kernel. Which, depends on a row's own new tokens and on what is static.

Letters: T tokens of the ragged batch, R rows, M `max_pages_per_seq`, C `ShortRows.max_q_len`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from paxattn.attention.checks import Request
from paxattn.attention.extent import readable
from paxattn.attention.mosaic_gpu import prefill_config, prefill_tiles
from paxattn.attention.mosaic_gpu.config import Config
from paxattn.attention.mosaic_gpu.portable.cards import Card
from paxattn.attention.mosaic_gpu.portable.config import max_rows
from paxattn.attention.mosaic_gpu.prefill_tiles import Tiles
from paxattn.attention.schedule import Schedule, schedule_decode
from paxattn.page_table import token_rows
from paxattn.quantized import head_bytes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ShortRows:
    """The decode kernel's part.

    Attributes:
        schedule: its work.
        place: i32[T], where each token's result is in [R * C].
        served: bool[T], whether a token is of a row that the kernel serves.
        stored: i32[R], tokens that can be read; None for Hopper, whose kernel sees for itself.
        max_q_len: C, bound on the new tokens of those rows.
        config: block sizes.
        card: what the portable kernel runs on; None: it is the one for Hopper.
    """

    schedule: Schedule
    place: jax.Array
    served: jax.Array
    stored: jax.Array | None
    max_q_len: int = field(metadata=dict(static=True))
    config: Config = field(metadata=dict(static=True))
    card: Card | None = field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LongRows:
    """The prefill kernel's part: its work, block sizes, and the card as in `ShortRows`."""

    tiles: Tiles
    config: prefill_config.Config = field(metadata=dict(static=True))
    card: Card | None = field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Plan:
    """Both parts; None where a kernel can have nothing to do, whatever the lengths are."""

    short: ShortRows | None
    long: LongRows | None


@functools.partial(
    jax.jit,
    static_argnames=(
        "request", "short_q_len", "decode", "decode_card", "prefill", "prefill_card", "split_over",
    ),
)  # fmt: skip
def plan_batch(
    *,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    sliding_window: jax.Array | int | None,
    request: Request,
    short_q_len: int,
    decode: Config | None,
    prefill: prefill_config.Config | None,
    decode_card: Card | None = None,
    prefill_card: Card | None = None,
    split_over: int | None = None,
) -> Plan:
    """Divides a batch.

    Args:
        block_tables: i32[R, M].
        kv_lens: i32[R].
        cu_q_lens: i32[R + 1].
        sliding_window: i32[] (not positive: none), or None.
        request: what is static about the call.
        short_q_len: C, from `config.short_q_len`.
        decode: the decode kernel's block sizes; None if no row goes there.
        prefill: the prefill kernel's; None if no row goes there.
        decode_card: what the portable decode kernel runs on; None: that for Hopper serves.
        prefill_card: the same of the prefill kernel.
        split_over: see `prefill_tiles.cut`.

    Returns:
        The plan.
    """
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    short, long = q_lens <= short_q_len, None
    rows, offsets, active = token_rows(q_lens, request.num_tokens)
    if prefill is not None:
        group = request.num_q_heads // request.num_kv_heads
        tiles = prefill_tiles.cut(
            block_tables=block_tables,
            kv_lens=kv_lens,
            cu_q_lens=cu_q_lens,
            chosen=~short,
            window=None if sliding_window is None else jnp.asarray(sliding_window, jnp.int32),
            causal=request.causal,
            num_tokens=request.num_tokens,
            group=group,
            num_kv_heads=request.num_kv_heads,
            num_pages=request.num_pages,
            page_size=request.page_size,
            token_bytes=2 * head_bytes(request.head_dim, request.page_dtype or request.dtype),
            min_packed=(short_q_len + 1) * group,
            size=prefill_config.TILE if prefill_card is None else max_rows(request.head_dim),
            block_kv=prefill.block_kv,
            split_over=split_over,
        )
        long = LongRows(tiles=tiles, config=prefill, card=prefill_card)
        q_lens = jnp.where(short, q_lens, 0)
    if decode is None:
        return Plan(short=None, long=long)
    schedule = schedule_decode(
        q_lens,
        kv_lens,
        jnp.asarray(0 if sliding_window is None else sliding_window, jnp.int32),
        num_kv_heads=request.num_kv_heads,
        page_size=request.page_size,
        max_pages_per_seq=request.max_pages_per_seq,
        block_kv=decode.block_kv,
        num_cores=decode.num_cores,
        split=None if decode.split is None else decode.split // decode.block_kv,
    )
    stored = None
    if decode_card is not None:
        stored = readable(
            block_tables, kv_lens, kv_lens - q_lens, sliding_window,
            num_pages=request.num_pages, page_size=request.page_size,
        )  # fmt: skip
    rows = jnp.where(active, rows, 0)
    served = active & ((q_lens > 0) & (kv_lens > 0))[rows]
    return Plan(
        short=ShortRows(
            schedule=schedule,
            place=rows * short_q_len + jnp.minimum(offsets, short_q_len - 1),
            served=served,
            stored=stored,
            max_q_len=short_q_len,
            config=decode,
            card=decode_card,
        ),
        long=long,
    )
