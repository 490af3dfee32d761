"""The TPU kernel beside JAX's own ragged kernel, for TPUs that are not there: memory and traffic.

    python benchmarks/tpu_compile.py [--generations v5e,v6e,v5p,tpu7x] [--resume]

Needs the wheel libtpu. What is made is saved at once, and `--resume` goes on from there. Nothing
runs. Per batch, kernel and generation:

VMEM    what the compiler allots to the kernel, or says that it would if the limit were higher (16
        MiB on v5e and v5p, 32 on the others, if it is not raised by hand)
SMEM    what is prefetched to scalar memory, and our page ids
moved   bytes that copies between HBM and the chip's memories move, counted from the grid and the
        schedule (the compiler's own estimate leaves out a kernel's copies)
minimum bytes of every page that some query sees, once, of the queries and of the results

Moved over minimum says how much is fetched for nothing, or more than once: a row's tiles of queries
read its pages each. JAX's kernel has its keys and values interleaved in one array of the same size;
its block sizes are its tuned ones for the generation, as its table has them.
"""

from __future__ import annotations

import argparse
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

from paxattn.attention import checks, paged_attention
from paxattn.attention.mosaic_tpu import config, support
from paxattn.target import Target

H, G, D, P, N, ITEM = 8, 4, 128, 16, 40_000, 2  # a layer of Llama 3 8B, bf16
M = 512
KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v5p": "TPU v5", "tpu7x": "TPU7x"}
BATCHES = {  # new tokens and stored tokens of each row
    "decode 64 x 4k": ((1,) * 64, (4096,) * 64),
    "decode 32, skewed": ((1,) * 32, (8000, *range(100, 1650, 50))),
    "prefill 4 x 512": ((512,) * 4, (512,) * 4),
    "chunk 256 of 4k, 31 decode": ((256,) + (1,) * 31, (4096,) + (2000,) * 31),
    "window 512, decode 32 x 4k": ((1,) * 32, (4096,) * 32),
}
TOKEN = 2 * H * D * ITEM  # bytes of a token's K and V


def window_of(name: str) -> int | None:
    return 512 if name.startswith("window") else None


def arguments(name: str) -> dict[str, Any]:
    """A batch's arrays; pages are shapes only."""
    q_lens, kv_lens = BATCHES[name]
    tables = np.full((len(q_lens), M), N, np.int32)
    for row, tokens in enumerate(kv_lens):
        held = -(-tokens // P)
        tables[row, :held] = row * M + np.arange(held)
    return dict(
        q=jax.ShapeDtypeStruct((sum(q_lens), H * G, D), jnp.bfloat16),
        k_pages=jax.ShapeDtypeStruct((N, H, P, D), jnp.bfloat16),
        v_pages=jax.ShapeDtypeStruct((N, H, P, D), jnp.bfloat16),
        block_tables=np.minimum(tables, N),
        kv_lens=np.asarray(kv_lens, np.int32),
        cu_q_lens=np.cumsum([0, *q_lens], dtype=np.int32),
    )


def minimum(name: str) -> int:
    window, total = window_of(name), 0
    for q_len, kv_len in zip(*BATCHES[name], strict=True):
        first = max(kv_len - q_len + 1 - window, 0) // P if window else 0
        total += (-(-kv_len // P) - first) * P * TOKEN + 2 * q_len * H * G * D * ITEM
    return total


def ours(name: str, generation: str) -> dict[str, Any]:
    given = arguments(name)
    static = dict(max_q_len=max(BATCHES[name][0]), sliding_window=window_of(name))
    request = checks.check(**given, **static)
    batch = {k: given[k] for k in ("block_tables", "kv_lens", "cu_q_lens")}
    plan = support.schedule(
        request, Target(platform="tpu", device_kind=KINDS[generation]), **batch,
        sliding_window=static["sliding_window"], fixed_split=None,
    )  # fmt: skip
    moved = smem = 0
    for tiles in plan.launches:
        live = int(tiles.count[0])
        starts, stops = (np.asarray(x)[:live] for x in (tiles.starts, tiles.stops))
        pages = int((-(-stops // P) - starts // P).sum())
        turns, block = H // tiles.config.block_heads, tiles.config.block_pages
        pieces = [  # of page ids; blocks that follow each other may have the same
            (row, first // config.LANES)
            for row, start, stop in zip(np.asarray(tiles.rows)[:live], starts, stops, strict=True)
            for _ in range(turns)
            for first in range(start // P // block * block, -(-stop // P), block)
        ]
        ids = sum(here != before for here, before in zip(pieces, [None, *pieces], strict=False))
        rows = config.packed_rows(tiles.config.block_q, G)
        results = live * H * rows * (2 * D * ITEM + 4)
        arrays = (tiles.rows, tiles.lens, tiles.positions, tiles.starts, tiles.stops)
        prefetched = sum(x.size * 4 for x in arrays) + 4 * 4
        moved += pages * P * TOKEN + ids * config.LANES * 4 + results + prefetched
        smem = max(smem, prefetched + 2 * config.LANES * 4)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    vmem = vmem_of(
        lambda given: paged_attention(**given, **static, implementation="mosaic_tpu"),
        (shapes,), generation,
    )  # fmt: skip
    return dict(kernel="paxattn", VMEM=vmem, SMEM=smem, moved=moved)


def theirs(name: str, generation: str) -> dict[str, Any]:
    given, (q_lens, kv_lens) = arguments(name), BATCHES[name]
    shape = jax.ShapeDtypeStruct
    arrays = (
        given["q"], shape((N, P, 2 * H, D), jnp.bfloat16), shape((len(q_lens),), jnp.int32),
        shape(given["block_tables"].shape, jnp.int32), shape((len(q_lens) + 1,), jnp.int32),
        shape((1,), jnp.int32),
    )  # fmt: skip
    heads, combined = peer.get_min_heads_per_blk(H * G, 2 * H, jnp.bfloat16, jnp.bfloat16)
    with as_if_on(generation):
        pages, block_q = tuned_block_sizes.get_tuned_block_sizes(
            jnp.bfloat16, jnp.bfloat16, heads, combined // 2, D, P, sum(q_lens), M
        )
    ends, blocks = np.cumsum(q_lens), 0
    for begin in range(0, sum(q_lens), block_q):  # each block of queries reads its rows' pages
        inside = (ends > begin) & (ends - q_lens < begin + block_q)
        blocks += int((-(-np.asarray(kv_lens) // (pages * P)))[inside].sum())
    prefetched = 4 * (len(q_lens) * M + 2 * len(q_lens) + 4)
    queries = -(-sum(q_lens) // block_q) * block_q * H * G * D * ITEM
    moved = blocks * pages * P * TOKEN + 2 * queries + prefetched
    static = dict(
        num_kv_pages_per_block=pages, num_queries_per_block=block_q, sliding_window=window_of(name)
    )
    vmem = vmem_of(lambda *x: peer.ragged_paged_attention(*x, **static), arrays, generation)
    return dict(kernel=f"jax ({block_q} x {pages})", VMEM=vmem, SMEM=prefetched, moved=moved)


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
    made = {(row["generation"], row["batch"], row["kernel"].split()[0]) for row in rows}
    for generation, name in itertools.product(args.generations.split(","), BATCHES):
        least = minimum(name)
        for who, kernel in (("paxattn", ours), ("jax", theirs)):
            if (generation, name, who) in made:
                continue
            row = dict(batch=name, generation=generation) | kernel(name, generation)
            rows.append(row | dict(minimum=least, ratio=row["moved"] / least))
            _common.save("tpu_compile", rows)
    _common.show(f"H={H} G={G} D={D} P={P}, bf16, block tables of {M} pages; bytes", rows)


if __name__ == "__main__":
    main()
