"""The paged KV cache: every layer's keys and values in two preallocated arrays.

Layout (documented here once; everything else goes through the functions below):

    k_pages, v_pages     [num_layers, num_pages, num_kv_heads, page_size, head_dim]
    k_scales, v_scales   [num_layers, num_pages, num_kv_heads, page_size], of fp8 and int8 pages

A *page* holds ``page_size`` consecutive tokens of one sequence, for all layers and heads. One
``[page_size, head_dim]`` tile per (layer, page, head) is contiguous, which is what a kernel copies
at a time; heads have an axis of their own so that a mesh can shard them. A *slot* is one token's
place: ``slot = page * page_size + offset``. Token ``i`` of row ``r`` lies in

    page   = block_tables[r, i // page_size]
    offset = i % page_size

and a row holding ``kv_lens[r]`` tokens uses ``ceil(kv_lens[r] / page_size)`` pages, of which the
last holds ``kv_lens[r] - page_size * (ceil(kv_lens[r] / page_size) - 1)`` valid tokens.

Worked example: ``page_size=4``, ``num_pages=6``; row 0 holds 6 tokens in pages 2 and 0, so
``block_tables[0] = [2, 0, 6, ...]`` (6, the number of pages, means "no page") and
``kv_lens[0] = 6``. Token 5 lies in page ``block_tables[0, 1] = 0`` at offset ``1``: slot 1. The
next token, number 6, goes to slot 2. With 2 layers, 3 KV heads, head_dim 8 and bf16 a page takes
``2 * 2 * 3 * 4 * 8 * 2 = 768`` bytes (the first 2 for K and V) and a token a quarter of that.

Quantised pages (float8_e4m3fn, int8) hold numbers in units of a scale for each token and head, see
`quantized` for what that costs and why it is so. The scales lie beside the pages, by the same
indices, and go wherever these go: what a page holds is right after any step of the table, because
a token's numbers depend on no other token. The page above takes 384 + 2 * 2 * 3 * 4 * 2 = 480 bytes
in int8.

On a TPU, 64 numbers fill half of a register's 128 lanes, and XLA would store such a pool in an
order of its own, that no kernel reads without copying it. So where head_dim is 64 there,
`init_kv_cache` lays heads side by side in pairs (``heads_per_row=2``):

    k_pages, v_pages     [num_layers, num_pages, ceil(num_kv_heads / 2), page_size, 128]
    k_scales, v_scales   [num_layers, num_pages, 2 * ceil(num_kv_heads / 2), page_size]

Head ``2i`` has the first half of row ``i``, head ``2i + 1`` the second. If the number of heads is
odd, the last half is zero (``spare_heads=1``), and takes its bytes all the same. What is not finite
in a token's keys shows in the results of both heads of the pair.

The arrays are meant to be donated to the jitted step and carried through its loops: `write` and
`copy_pages` then change them in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from paxattn.page_table import PageCopies
from paxattn.page_table.inputs import as_integers, check_positive
from paxattn.page_table.pages import varying_like
from paxattn.page_table.state import check_pool
from paxattn.quantized import SCALE_DTYPE, head_bytes, is_quantized, page_dtype, quantize
from paxattn.target import target_of

PAIRED_HEAD_DIM = 64  # two such heads fill the 128 lanes of a TPU's registers


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of all layers, in pages.

    Made by `init_kv_cache`; derive one from another by `dataclasses.replace` or `jax.tree.map`,
    which keep its layout.

    Attributes:
        k_pages: ``[num_layers, num_pages, num_kv_heads, page_size, head_dim]``, in one of
            `quantized.PAGE_DTYPES`; or with heads in pairs.
        v_pages: the same shape and dtype.
        k_scales: bf16 ``[num_layers, num_pages, num_kv_heads, page_size]`` of quantised pages (with
            a place for a spare head): what numbers of ``k_pages`` are multiplied by; None: pages
            hold floats as they are.
        v_scales: the same of ``v_pages``.
        heads_per_row: heads that lie side by side, 1 or 2 (static).
        spare_heads: 1 if the last pair has one head only, else 0 (static).
    """

    k_pages: jax.Array
    v_pages: jax.Array
    k_scales: jax.Array | None = None
    v_scales: jax.Array | None = None
    heads_per_row: int = field(default=1, metadata=dict(static=True))
    spare_heads: int = field(default=0, metadata=dict(static=True))

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.k_pages.shape[0]

    @property
    def num_pages(self) -> int:
        """Number of pages in the pool."""
        return self.k_pages.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.k_pages.shape[2] * self.heads_per_row - self.spare_heads

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.k_pages.shape[3]

    @property
    def head_dim(self) -> int:
        """Elements per head."""
        return self.k_pages.shape[4] // self.heads_per_row

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V that one token takes over all layers, scales and spare included."""
        per_head = head_bytes(self.head_dim, self.k_pages.dtype)
        return 2 * self.num_layers * (self.num_kv_heads + self.spare_heads) * per_head

    @property
    def bytes_per_page(self) -> int:
        """Bytes of K and V that one page takes over all layers."""
        return self.bytes_per_token * self.page_size

    def query_dtype(self, dtype: DTypeLike) -> np.dtype:
        """The dtype that a model's queries take to attend: float pages' own, else theirs."""
        return jnp.dtype(dtype if self.k_scales is not None else self.k_pages.dtype)


def heads_in_a_row(head_dim: int) -> int:
    """Heads that lie side by side in the pages of a cache made here and now: 2 or 1.

    By the target that code is built for, that of the mesh or the default device.
    """
    return 2 if head_dim == PAIRED_HEAD_DIM and target_of(None).platform == "tpu" else 1


def init_kv_cache(
    *,
    num_layers: int,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike = jnp.bfloat16,
) -> KVCache:
    """Allocate a zeroed cache, in the layout for the mesh's or the default device.

    Args:
        num_layers: layers that keep keys and values.
        num_pages: pages in the pool, as in the `PageTable` used with it.
        page_size: tokens per page, 1 to 256, as in the `PageTable` used with it.
        num_kv_heads: key/value heads per layer.
        head_dim: elements per head.
        dtype: float32, bfloat16 or float16; or float8_e4m3fn ("fp8") or int8, with scales.

    Raises:
        ValueError: a size is not a positive integer, `page_size` is above 256, the slots would
            overflow int32, or the dtype is none of those.
    """
    num_pages, page_size = check_pool(num_pages, page_size)
    num_layers = check_positive("num_layers", num_layers)
    num_kv_heads = check_positive("num_kv_heads", num_kv_heads)
    head_dim = check_positive("head_dim", head_dim)
    dtype = page_dtype(dtype)
    together = heads_in_a_row(head_dim)
    rows = -(-num_kv_heads // together)
    shape = num_layers, num_pages, rows, page_size, together * head_dim
    cache = KVCache(
        k_pages=jnp.zeros(shape, dtype),
        v_pages=jnp.zeros(shape, dtype),
        heads_per_row=together,
        spare_heads=rows * together - num_kv_heads,
    )
    if not is_quantized(dtype):
        return cache
    each = num_layers, num_pages, rows * together, page_size
    scales = (jnp.zeros(each, SCALE_DTYPE) for _ in range(2))
    return replace(cache, k_scales=next(scales), v_scales=next(scales))


def write(
    cache: KVCache, layer: ArrayLike, slots: ArrayLike, k: jax.Array, v: jax.Array
) -> KVCache:
    """Store one layer's new keys and values, quantised if the pages are.

    In place on a donated cache, with exceptions on CPUs, where XLA computes some scatters in a
    wider dtype and passes the whole pool through a conversion: those of bf16 with jax 0.10 (of int8
    pages that is the scales, a thirtieth of all), those of fp8 always. Use f32, f16 or int8 there.

    Plain scatters on GPUs too: in a decoder's step compiled for an H200, XLA makes one kernel for K
    and one for V, in place, and computes the rotary embedding of K inside; a kernel written by hand
    could save no memory traffic. On TPUs, XLA would turn the pool over, and back, for a scatter of
    whole tokens; every head's part of a token is an update of its own there, and the pool stays as
    it is (unless head_dim is neither 64 nor a multiple of 128: then nothing was found that does not
    copy it).

    Args:
        cache: the cache; donate it to the enclosing jit to have it changed in place.
        layer: which layer, an integer or i32[] (traced: out of range, nothing is written).
        slots: i32[T], from `page_table.slot_mapping`: distinct. Slots at or beyond
            ``num_pages * page_size`` are dropped, which is how inactive tokens write nothing, and
            so are negative ones.
        k: ``[T, num_kv_heads, head_dim]``, cast (or quantised) to the cache's dtype.
        v: ``[T, num_kv_heads, head_dim]``.

    Raises:
        ValueError: a shape or the layer does not fit the cache.
    """
    if isinstance(layer, int | np.integer) and not 0 <= layer < cache.num_layers:
        raise ValueError(f"{layer=} must be in [0, {cache.num_layers}), the cache's layers")
    layer, slots = as_integers("layer", layer, ()), as_integers("slots", slots, None)
    expected = (slots.shape[0], cache.num_kv_heads, cache.head_dim)
    for name, new in (("k", k), ("v", v)):
        if np.shape(new) != expected:
            raise ValueError(
                f"{name}.shape={np.shape(new)} must be {expected}: (tokens, num_kv_heads, head_dim)"
            )
    layers = jnp.broadcast_to(layer, slots.shape)
    pages, offsets = slots // cache.page_size, slots % cache.page_size
    # A negative index would wrap round to somebody else's page; and dropped ones must be distinct.
    outside = cache.num_pages + jnp.arange(slots.size, dtype=jnp.int32)
    pages = jnp.where((pages >= 0) & (pages < cache.num_pages) & (layer >= 0), pages, outside)

    # unique_indices: without it GPU scatters of 16-bit types fall back to a slow atomic loop.
    options: dict[str, Any] = dict(mode="drop", unique_indices=True)

    def by_token(pool: jax.Array, new: jax.Array) -> jax.Array:
        return pool.at[layers, pages, :, offsets].set(new, **options)

    def by_head(pool: jax.Array, new: jax.Array) -> jax.Array:
        heads = jnp.arange(pool.shape[2], dtype=jnp.int32)
        at = layers[:, None], pages[:, None], heads, offsets[:, None]
        return pool.at[at].set(new, **options)

    def store(pool: jax.Array, new: jax.Array) -> jax.Array:
        return lax.platform_dependent(pool, new, tpu=by_head, default=by_token)

    dtype, k_scales, v_scales = cache.k_pages.dtype, None, None
    if cache.spare_heads:
        k, v = (jnp.pad(x, ((0, 0), (0, cache.spare_heads), (0, 0))) for x in (k, v))
    if cache.k_scales is not None:
        (k, k_scales), (v, v_scales) = quantize(k, dtype), quantize(v, dtype)
    rows = slots.size, cache.k_pages.shape[2], cache.k_pages.shape[4]
    k, v = (x.astype(dtype).reshape(rows) for x in (k, v))
    tokens = replace(cache, k_pages=k, v_pages=v, k_scales=k_scales, v_scales=v_scales)
    return jax.tree.map(store, cache, tokens)


def copy_pages(cache: KVCache, copies: PageCopies) -> KVCache:
    """Run the copies that a table step asked for, in all layers.

    Must run before any write, read or further table step: the table already points at the
    destinations, and the sources may be handed out again by the next step. A loop over
    ``copies.count``: a step without copies costs nothing. Each turn moves a page of all layers,
    through a buffer of that size; compiled for an H200 or a TPU, too, the pool is changed in place.

    Args:
        cache: the cache; donate it to the enclosing jit to have it changed in place.
        copies: from `page_table.reserve`; the first ``count`` pairs are copied, in order.
    """

    def copy_one(i: jax.Array, cache: KVCache) -> KVCache:
        def move(pool: jax.Array) -> jax.Array:
            page = lax.dynamic_slice_in_dim(pool, copies.src[i], 1, axis=1)
            return lax.dynamic_update_slice_in_dim(pool, page, copies.dst[i], axis=1)

        return jax.tree.map(move, cache)

    orders = copies.src, copies.dst, copies.count
    cache = jax.tree.map(lambda pool: varying_like(pool, *orders), cache)
    return lax.fori_loop(0, copies.count, copy_one, cache)


def move_slots(cache: KVCache, src: ArrayLike, dst: ArrayLike) -> KVCache:
    """Copy tokens from slot to slot in all layers, as if all at once.

    What is kept of a tree of guesses moves to the slots that follow the row's earlier tokens.

    Args:
        cache: the cache; donate it to the enclosing jit to have it changed in place.
        src: i32[K], slots to read. They may be among those written: what was there before moves.
        dst: i32[K], slots to write, distinct; where one is out of range, nothing is written.

    Raises:
        ValueError: the numbers of slots differ, or they are not integers.
    """
    src = as_integers("src", src, None)
    dst = as_integers("dst", dst, src.shape)
    size, num_pages = cache.page_size, cache.num_pages
    outside = num_pages + jnp.arange(dst.size, dtype=jnp.int32)
    to = jnp.where((dst >= 0) & (dst // size < num_pages), dst // size, outside)

    def move(pool: jax.Array) -> jax.Array:
        tokens = pool.at[:, src // size, :, src % size].get(mode="clip")
        return pool.at[:, to, :, dst % size].set(tokens, mode="drop", unique_indices=True)

    return jax.tree.map(move, cache)


def scrub(cache: KVCache, pages: ArrayLike, start: ArrayLike, stop: ArrayLike) -> KVCache:
    """Zero the pages ``pages[start:stop]`` in all layers.

    Attention never reads a slot that its row does not own, so this is not needed for correct
    results; it is for tenants who must not trust masks alone. The pages that a table step gave
    back are the top of the free stack:

        freed = page_table.release(table, mask)
        cache = kv_cache.scrub(cache, freed.free_pages, table.num_free, freed.num_free)

    Args:
        cache: the cache; donate it to the enclosing jit to have it changed in place.
        pages: i32[K], page ids; those out of range are skipped.
        start: first index into ``pages``, i32[].
        stop: one past the last index, i32[].
    """
    pages = as_integers("pages", pages, None)
    if pages.size == 0:
        return cache

    def zero_one(i: jax.Array, cache: KVCache) -> KVCache:
        page = jnp.where(pages[i] < 0, cache.num_pages, pages[i])

        def zero(pool: jax.Array) -> jax.Array:
            zeros = jnp.zeros_like(pool, shape=(pool.shape[0], *pool.shape[2:]))
            return pool.at[:, page].set(zeros, mode="drop")

        return jax.tree.map(zero, cache)

    # A negative start would count from the end.
    start = jnp.maximum(as_integers("start", start, ()), 0)
    stop = jnp.minimum(as_integers("stop", stop, ()), pages.shape[0])
    cache = jax.tree.map(lambda pool: varying_like(pool, pages, start, stop), cache)
    return lax.fori_loop(start, stop, zero_one, cache)
