"""Peers that come with torch, timed as replays of a CUDA graph: each a `compare.Timer`.

What is looked for, in the folder of peers (`--peers`, not in the repository) or installed:

    _vllm_fa3_C.abi3.so, or with .xz   FlashAttention-3 as vLLM builds it (varlen, paged, split KV)
    site/flashinfer, site/tvm_ffi      FlashInfer with its modules compiled ahead of time
    site/vllm/v1/attention/ops/        triton_unified_attention.py and what it imports

Each call reads by the tables of another turn, as in `paxattn.attention.measure`.
"""

from __future__ import annotations

import dataclasses
import lzma
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpu_sections.compare import REPEATS, Timer
from gpu_sections.context import Context, host_error, transposed
from paxattn.attention import measure
from paxattn.attention.measure import Inputs, Workload


def present(context: Context) -> dict[str, Timer]:
    """Those that can run here, by name; the others are named as skipped."""
    found: dict[str, Timer] = {}
    for name, find in (
        ("FlashAttention-3", _find_flash_attention),
        ("FlashInfer", _find_flashinfer),
        ("vLLM Triton", _find_vllm_triton),
    ):
        try:
            import torch

            if not torch.cuda.is_available():
                raise ImportError("torch has no GPU")
            found[name] = find(context.peers)
        except (ImportError, OSError, RuntimeError) as error:
            context.emit({"peer": name, "skipped": " ".join(str(error).split())[:200]})
    return found


def _to_torch(inputs: Inputs) -> dict[str, Any]:
    """Tensors of queries, pages [N, P, Hkv, D] and the rest."""
    import torch

    def convert(array: jax.Array) -> Any:
        if array.dtype != jnp.float8_e4m3fn:
            return torch.from_dlpack(array)
        # (Not every version of the protocol knows fp8.)
        array = lax.bitcast_convert_type(array, jnp.uint8)
        return torch.from_dlpack(array).view(torch.float8_e4m3fn)

    x = transposed(inputs, (0, 2, 1, 3))
    names = ("q", "k_pages", "v_pages", "tables", "kv_lens", "cu_q_lens")
    return {name: convert(getattr(x, name)) for name in names}


def _time(
    work: Workload, inputs: Inputs, out: Any, calls: Sequence[Callable[[], Any]]
) -> tuple[float, float]:
    """Captures calls (one per turn) in a graph, checks the last one, and times replays."""
    import torch

    steps = measure.steps_for(work)
    out.fill_(float("nan"))
    for call in calls[: min(steps, len(calls))]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(steps):
            calls[i % len(calls)]()
    out.fill_(float("nan"))
    times = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / steps)
    answer = jnp.asarray(out.float().cpu().numpy())
    return statistics.median(times[1:]), host_error(work, inputs, steps, answer)


def _find_flash_attention(peers: Path) -> Timer:
    import torch

    library = peers / "_vllm_fa3_C.abi3.so"
    packed = library.with_name(library.name + ".xz")
    if not library.exists() and packed.exists():
        library = Path(tempfile.mkdtemp(), library.name)
        library.write_bytes(lzma.decompress(packed.read_bytes()))
    if not library.exists():
        raise ImportError(f"no {library}")
    torch.ops.load_library(str(library))

    def timer(work: Workload, inputs: Inputs) -> tuple[float, float]:
        inputs, scales = _one_scale(work, inputs)
        x = _to_torch(inputs)
        out, longest = torch.empty_like(x["q"]), max(stored for _, stored in work.rows)
        q, descale = x["q"], None
        if scales is not None:  # fp8 through and through
            q = q.to(torch.float8_e4m3fn)
            descale = torch.full((len(work.rows), work.num_kv_heads), scales, device="cuda")

        def call(table: Any) -> None:
            # k_new .. q_v; out; cu_q, cu_k, cu_k_new, used_q; used_k; longest q and k; the table;
            # kv_batch_idx .. descales, seqlens_rotary; scale, causal, window, chunk, softcap,
            # rotary_interleaved; scheduler's metadata, splits (0: its choice), pack_gqa, margin,
            # sinks, context parallelism.
            torch.ops._vllm_fa3_C.fwd(
                q, x["k_pages"], x["v_pages"], None, None, None, out, x["cu_q_lens"],
                None, None, None, x["kv_lens"], work.max_q_len, longest, table,
                None, None, None, None, None, None, descale, descale, work.head_dim**-0.5, True,
                -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,
            )  # fmt: skip

        return _time(work, inputs, out, [partial(call, table) for table in x["tables"]])

    return timer


def _one_scale(work: Workload, inputs: Inputs) -> tuple[Inputs, float | None]:
    """The same with one scale for all numbers, and that scale; of pages of floats None."""
    if inputs.k_scales is None or inputs.v_scales is None:
        return inputs, None
    scale = float(inputs.k_scales[0].mean())  # (bf16, as all of them)
    k_scales, v_scales = (jnp.full_like(x, scale) for x in (inputs.k_scales, inputs.v_scales))
    return dataclasses.replace(inputs, k_scales=k_scales, v_scales=v_scales), scale


def _find_flashinfer(peers: Path) -> Timer:
    del peers
    import flashinfer
    import torch

    def timer(work: Workload, inputs: Inputs) -> tuple[float, float]:
        if work.max_q_len > 1:
            raise NotImplementedError("only its decode wrapper is timed")
        x = _to_torch(inputs)
        out = torch.empty_like(x["q"])
        held = [-(-stored // work.page_size) for _, stored in work.rows]
        indptr = torch.tensor(np.cumsum([0, *held]), dtype=torch.int32, device="cuda")
        last = (x["kv_lens"] - 1) % work.page_size + 1
        calls = []
        for table in x["tables"]:
            pages = torch.cat([row[:n] for row, n in zip(table, held, strict=True)])
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                torch.empty(2**27, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
            )
            wrapper.plan(
                indptr, pages, last.int(), work.num_q_heads, work.num_kv_heads, work.head_dim,
                work.page_size, q_data_type=x["q"].dtype, data_type=x["q"].dtype,
            )  # fmt: skip
            calls.append(partial(wrapper.run, x["q"], (x["k_pages"], x["v_pages"]), out=out))
        return _time(work, inputs, out, calls)

    return timer


def _find_vllm_triton(peers: Path) -> Timer:
    del peers
    import torch
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    def timer(work: Workload, inputs: Inputs) -> tuple[float, float]:
        x, segments = _to_torch(inputs), 16
        out, rows = torch.empty_like(x["q"]), len(work.rows)

        def segment(*shape: int) -> Any:
            shape = (rows, work.num_q_heads, segments, *shape)
            return torch.empty(shape, dtype=torch.float32, device="cuda")

        options = dict(
            q=x["q"], k=x["k_pages"], v=x["v_pages"], out=out, cu_seqlens_q=x["cu_q_lens"],
            max_seqlen_q=work.max_q_len, seqused_k=x["kv_lens"],
            max_seqlen_k=max(stored for _, stored in work.rows),
            softmax_scale=work.head_dim**-0.5, causal=True, window_size=(-1, -1), softcap=0.0,
            q_descale=None, k_descale=None, v_descale=None, num_par_softmax_segments=segments,
            # Up to so many rows each sequence is cut: without these it is a slower kernel.
            seq_threshold_3D=max(128 // work.num_kv_heads, 1),
            softmax_segm_output=segment(work.head_dim), softmax_segm_max=segment(),
            softmax_segm_expsum=segment(),
        )  # fmt: skip
        calls = [partial(unified_attention, block_table=table, **options) for table in x["tables"]]
        return _time(work, inputs, out, calls)

    return timer
