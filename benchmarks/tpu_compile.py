"""The TPU kernel beside JAX's own ragged kernel, for TPUs that are not there: memory and traffic.

    python benchmarks/tpu_compile.py [--generations v5e,v6e,v5p,tpu7x] [--resume]

Needs the wheel libtpu. What is made is saved at once, and `--resume` goes on from there. Nothing
runs. Per variant, batch, kernel and generation:

VMEM    what the compiler allots to the kernel, or says that it would if the limit were higher (16
        MiB on v5e and v5p, 32 on the others, if it is not raised by hand)
SMEM    what is prefetched to scalar memory, and our page ids
moved   bytes that copies between HBM and the chip's memories move, counted from the grid and the
        schedule (the compiler's own estimate leaves out a kernel's copies)
minimum bytes of every page that some query sees (as the kernel's pool has them), once, of the
        queries and of the results

Moved over minimum says how much is fetched for nothing, or more than once: a row's tiles of queries
read its pages each. JAX's kernel has its keys and values interleaved in one array of the same size
(quantised, with one scale for all numbers, which is no part of the array); its block sizes are its
tuned ones for the generation, as its table has them. What it does not compile for is named. Queries
and results lie in tiles of 8 heads there; ours in tiles of a KV head's, 2, 4 or 8 rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tpu_compiler

os.environ.update(tpu_compiler.SETTINGS)  # before jax starts
from unittest import mock

import _common
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
    kernel as peer,
)
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
    tuned_block_sizes,
)

from paxattn import kv_cache, quantized
from paxattn.attention import checks, paged_attention
from paxattn.attention.mosaic_tpu import config, support
from paxattn.target import Target

TOKENS = 640_000  # in a layer's pool
LONGEST = 8192  # tokens that the block tables have room for
ITEM = 2  # bytes of a bf16 number
KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v5p": "TPU v5", "tpu7x": "TPU7x"}
BATCHES = {  # new tokens and stored tokens of each row
    "decode 64 x 4k": ((1,) * 64, (4096,) * 64),
    "chunk 256 of 4k, 31 decode": ((256,) + (1,) * 31, (4096,) + (2000,) * 31),
    "decode 32, skewed": ((1,) * 32, (8000, *range(100, 1650, 50))),
    "prefill 4 x 512": ((512,) * 4, (512,) * 4),
    "window 512, decode 32 x 4k": ((1,) * 32, (4096,) * 32),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A layer, with queries in bf16, and the batches that it is looked at with."""

    heads: tuple[int, int]  # query, KV
    head_dim: int = 128
    page_size: int = 16
    page_dtype: Any = jnp.bfloat16
    batches: tuple[str, ...] = tuple(BATCHES)[:2]

    def __str__(self) -> str:
        heads = "{}/{}".format(*self.heads)
        return f"{heads} d{self.head_dim} p{self.page_size} {self.page_dtype.dtype.name}"

    @property
    def quantized(self) -> bool:
        """Whether pages are."""
        return self.page_dtype.dtype.itemsize < ITEM

    @property
    def most_pages(self) -> int:
        """Entries of a row of the block tables."""
        return LONGEST // self.page_size

    def token_bytes(self, scales: bool) -> int:
        """Of a token's keys and values."""
        of_head = self.head_dim * self.page_dtype.dtype.itemsize + (2 if scales else 0)
        return 2 * self.heads[1] * of_head


VARIANTS = (
    Variant((32, 8), batches=tuple(BATCHES)),  # Llama 3 8B
    Variant((32, 8), head_dim=64),  # Llama 3.2 1B
    Variant((16, 8), head_dim=256),  # Gemma 2 9B
    Variant((28, 4)),  # Qwen2 7B
    Variant((32, 32)),  # Llama 2 7B
    Variant((32, 8), page_size=128, page_dtype=jnp.int8),
    Variant((32, 8), page_size=128, page_dtype=jnp.float8_e4m3fn),
)


def window_of(name: str) -> int | None:
    return 512 if name.startswith("window") else None


def block_tables(variant: Variant, name: str) -> np.ndarray:
    most, (_, kv_lens) = variant.most_pages, BATCHES[name]
    tables = np.full((len(kv_lens), most), TOKENS // variant.page_size, np.int32)
    for row, tokens in enumerate(kv_lens):
        held = -(-tokens // variant.page_size)
        tables[row, :held] = row * most + np.arange(held)
    return np.minimum(tables, TOKENS // variant.page_size)


def minimum(variant: Variant, name: str, scales: bool) -> int:
    window, size, total = window_of(name), variant.page_size, 0
    of_query = variant.heads[0] * variant.head_dim * ITEM
    for q_len, kv_len in zip(*BATCHES[name], strict=True):
        first = max(kv_len - q_len + 1 - window, 0) // size if window else 0
        pages = -(-kv_len // size) - first
        total += pages * size * variant.token_bytes(scales) + 2 * q_len * of_query
    return total


def ours(variant: Variant, name: str, generation: str) -> dict[str, Any]:
    (q_lens, kv_lens), (num_q_heads, num_kv_heads) = BATCHES[name], variant.heads
    shape, size = jax.ShapeDtypeStruct, variant.page_size
    together = 2 if variant.head_dim == kv_cache.PAIRED_HEAD_DIM else 1
    kv_rows, dim = num_kv_heads // together, together * variant.head_dim
    pages = shape((TOKENS // size, kv_rows, size, dim), variant.page_dtype)
    given: dict[str, Any] = dict(
        q=shape((sum(q_lens), num_q_heads, variant.head_dim), jnp.bfloat16),
        k_pages=pages,
        v_pages=pages,
        block_tables=block_tables(variant, name),
        kv_lens=np.asarray(kv_lens, np.int32),
        cu_q_lens=np.cumsum([0, *q_lens], dtype=np.int32),
    )
    if variant.quantized:
        scales = shape((TOKENS // size, num_kv_heads, size), quantized.SCALE_DTYPE)
        given |= dict(k_scales=scales, v_scales=scales)
    static = dict(max_q_len=max(q_lens), sliding_window=window_of(name), num_kv_heads=num_kv_heads)
    request = checks.check(**given, **static)
    batch = {k: given[k] for k in ("block_tables", "kv_lens", "cu_q_lens")}
    plan = support.schedule(
        request, Target(platform="tpu", device_kind=KINDS[generation]), **batch,
        sliding_window=static["sliding_window"], fixed_split=None,
    )  # fmt: skip
    group = request.num_q_heads // request.num_kv_heads
    moved = smem = 0
    for tiles in plan.launches:
        live = int(tiles.count[0])
        starts, stops = (np.asarray(x)[:live] for x in (tiles.starts, tiles.stops))
        fetched = int((-(-stops // size) - starts // size).sum())
        turns, block = kv_rows // tiles.config.block_heads, tiles.config.block_pages
        pieces = [  # of page ids; blocks that follow each other may have the same
            (row, first // config.LANES)
            for row, start, stop in zip(np.asarray(tiles.rows)[:live], starts, stops, strict=True)
            for _ in range(turns)
            for first in range(start // size // block * block, -(-stop // size), block)
        ]
        ids = sum(here != before for here, before in zip(pieces, [None, *pieces], strict=False))
        rows = config.packed_rows(tiles.config.block_q, group)
        results = live * kv_rows * rows * (2 * dim * ITEM + 4)
        arrays = (tiles.rows, tiles.lens, tiles.positions, tiles.starts, tiles.stops)
        prefetched = sum(x.size * 4 for x in arrays) + 4 * 4
        moved += fetched * size * variant.token_bytes(scales=False)
        if variant.quantized:
            heads = tiles.config.block_heads * together
            lines = turns * config.fetched_scales(heads, num_kv_heads)
            moved += fetched * 2 * lines * max(size, config.LANES) * ITEM
        moved += ids * config.LANES * 4 + results + prefetched
        smem = max(smem, prefetched + 2 * config.LANES * 4)
    shapes = jax.tree.map(lambda x: shape(x.shape, x.dtype), given)
    vmem = vmem_of(
        lambda given: paged_attention(**given, **static, implementation="mosaic_tpu"),
        (shapes,), generation,
    )  # fmt: skip
    least = minimum(variant, name, scales=variant.quantized)
    return figures("paxattn", vmem, smem, moved, least)


def theirs(variant: Variant, name: str, generation: str) -> dict[str, Any]:
    (q_lens, kv_lens), (num_q_heads, num_kv_heads) = BATCHES[name], variant.heads
    shape, size, dtype = jax.ShapeDtypeStruct, variant.page_size, variant.page_dtype
    arrays = (
        shape((sum(q_lens), num_q_heads, variant.head_dim), jnp.bfloat16),
        shape((TOKENS // size, size, 2 * num_kv_heads, variant.head_dim), dtype),
        shape((len(q_lens),), jnp.int32),
        shape((len(q_lens), variant.most_pages), jnp.int32),
        shape((len(q_lens) + 1,), jnp.int32),
        shape((1,), jnp.int32),
    )
    heads, combined = peer.get_min_heads_per_blk(num_q_heads, 2 * num_kv_heads, jnp.bfloat16, dtype)
    with as_if_on(generation):
        pages, block_q = tuned_block_sizes.get_tuned_block_sizes(
            jnp.bfloat16, dtype, heads, combined // 2, variant.head_dim, size, sum(q_lens),
            variant.most_pages,
        )  # fmt: skip
    static = dict(
        num_kv_pages_per_block=pages, num_queries_per_block=block_q, sliding_window=window_of(name)
    )
    if variant.quantized:
        static |= dict(k_scale=1.0, v_scale=1.0)
    kernel = f"jax ({block_q} x {pages})"
    try:
        vmem = vmem_of(lambda *x: peer.ragged_paged_attention(*x, **static), arrays, generation)
    except Exception as error:  # whatever the compiler raises
        print(f"{variant}, {name}, {generation}: {kernel}: {str(error)[:1000]}", file=sys.stderr)
        return figures(f"{kernel}: does not compile", None, None, None, None)
    ends, blocks = np.cumsum(q_lens), 0
    for begin in range(0, sum(q_lens), block_q):  # each block of queries reads its rows' pages
        inside = (ends > begin) & (ends - q_lens < begin + block_q)
        blocks += int((-(-np.asarray(kv_lens) // (pages * size)))[inside].sum())
    prefetched = 4 * (len(q_lens) * variant.most_pages + 2 * len(q_lens) + 4)
    of_query = -(-num_q_heads // 8) * 8 * variant.head_dim * ITEM
    queries = -(-sum(q_lens) // block_q) * block_q * of_query
    moved = blocks * pages * size * variant.token_bytes(scales=False) + 2 * queries + prefetched
    return figures(kernel, vmem, prefetched, moved, minimum(variant, name, scales=False))


def figures(kernel: str, vmem: Any, smem: Any, moved: Any, least: Any) -> dict[str, Any]:
    ratio = None if moved is None else moved / least
    return dict(kernel=kernel, VMEM=vmem, SMEM=smem, moved=moved, minimum=least, ratio=ratio)


def as_if_on(generation: str) -> Any:
    device = mock.Mock(device_kind=KINDS[generation])
    return mock.patch.object(tuned_block_sizes.jax, "devices", return_value=[device])


def vmem_of(function: Any, arguments: tuple, generation: str) -> int:
    """Bytes of vector memory that the largest kernel in a program is allotted."""
    try:
        text = tpu_compiler.compile_one(function, arguments, generation).as_text()
    except jax.errors.JaxRuntimeError as error:
        said = re.search(r"size ([\d.]+)([KM]) and limit", str(error))
        if said is None:
            raise
        return int(float(said[1]) * 2 ** {"K": 10, "M": 20}[said[2]])
    kernels = [line for line in text.splitlines() if '"tpu_custom_call"' in line]
    used = r'"used_scoped_memory_configs":\[\{"memory_space":"1",[^}]*"size":"(\d+)"'
    return max(int(size) for line in kernels for size in re.findall(used, line))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--generations", default=",".join(tpu_compiler.TOPOLOGIES))
    parser.add_argument("--resume", action="store_true", help="make only what is not saved yet")
    args = parser.parse_args()
    rows = _common.rows_of_this_machine("tpu_compile") if args.resume else []
    made = {tuple(row[x] for x in ("variant", "batch", "generation")) for row in rows}
    for generation, variant in itertools.product(args.generations.split(","), VARIANTS):
        for name in variant.batches:
            place = dict(variant=str(variant), batch=name, generation=generation)
            if tuple(place.values()) not in made:
                rows += [place | kernel(variant, name, generation) for kernel in (ours, theirs)]
                _common.save("tpu_compile", rows)
    _common.show(f"bf16 queries, block tables of {LONGEST} tokens; bytes", rows)


if __name__ == "__main__":
    main()
