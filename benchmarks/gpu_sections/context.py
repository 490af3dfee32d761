"""What every section has: its time, where rows go, and checks against float64 on the host."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from paxattn.attention.measure import Inputs, Workload


@dataclass(frozen=True)
class Context:
    """Of one section's process.

    Its journal has a line {"row": ...} for every row, {"begin": row} before each measurement, and
    {"row": ..., "of": row, "found": ...} after it. From those of an earlier process that died,
    `known` says what was found (None: nothing), by the JSON of the row that was begun.
    """

    tiny: bool
    peers: Path
    note: Callable[[dict], None]
    until: float
    known: Mapping[str, dict | None]

    @property
    def implementation(self) -> str:
        """The one that is measured."""
        return "reference" if self.tiny else "mosaic_gpu"

    def emit(self, row: dict) -> None:
        """Writes a row."""
        self.note({"row": row})

    def attempt(self, row: dict, measure: Callable[[], dict]) -> dict | None:
        """Emits a row with what `measure` finds, or with why it found nothing (and returns None).

        One failure must not cost the section its other rows: what was attempted before, by another
        process, is not attempted again.
        """
        key = json.dumps(row)
        if key in self.known:
            return self.known[key]
        if time.monotonic() > self.until:
            self.emit(row | {"skipped": "no time left"})
            return None
        # The last of these lines tells what a process that had to be killed was doing.
        print(f"  {' '.join(map(str, row.values()))}", file=sys.stderr, flush=True)
        self.note({"begin": row})
        found = None
        try:
            found = told = measure()
        except NotImplementedError as why:
            told = {"declined": " ".join(str(why).split())[:400]}
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        self.note({"row": row | told, "of": row, "found": found})
        if "error" in told and not _device_works():
            os._exit(1)  # (an orderly exit may wait for the device for ever)
        return found


def _device_works() -> bool:
    """Whether it still computes: after a fault in a kernel nothing does in this process."""
    try:
        return float(jnp.sum(jnp.ones(8))) == 8
    except Exception:
        return False


def workload(rows: list[tuple[int, int]], *, tiny: bool, **changes) -> Workload:
    """A workload in bf16, by default with the heads of Llama 3; a toy one for a dry run."""
    shape = dict(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16, dtype="bfloat16")
    shape |= changes
    if tiny:
        group = shape["num_q_heads"] // shape["num_kv_heads"]
        shape |= dict(num_q_heads=2 * group, num_kv_heads=2, head_dim=64, dtype="float32")
        rows = [(max(1, new // 256), max(1, stored // 256)) for new, stored in rows[:3]]
    return Workload(rows=tuple(rows), **shape)


def host_error(work: Workload, inputs: Inputs, steps: int, got: jax.Array) -> float:
    """The largest error of the last of `steps` calls, against float64 on the host.

    As in `measure.error`, it is relative to the largest number of the same token and head.
    Looked at are the first and the last row, one KV head of each, and at most their last 16 tokens.
    """
    tables = np.asarray(inputs.tables[(steps - 1) % inputs.tables.shape[0]])
    ends = np.asarray(inputs.cu_q_lens)
    group, worst = work.num_q_heads // work.num_kv_heads, 0.0

    def of_pages(scales: jax.Array | None, pages: np.ndarray, head: int) -> np.ndarray | float:
        """What numbers of these pages are multiplied by."""
        return 1.0 if scales is None else np.asarray(scales[pages, head], np.float64)[..., None]

    for row, head in ((0, 0), (len(work.rows) - 1, work.num_kv_heads - 1)):
        stored = work.rows[row][1]
        tokens = slice(max(ends[row], ends[row + 1] - 16), ends[row + 1])
        heads = slice(head * group, (head + 1) * group)
        pages = tables[row, : -(-stored // work.page_size)]
        k, v = (
            (np.asarray(x[pages, head], np.float64) * scale).reshape(-1, work.head_dim)[:stored]
            for x, scale in (
                (inputs.k_pages, of_pages(inputs.k_scales, pages, head)),
                (inputs.v_pages, of_pages(inputs.v_scales, pages, head)),
            )
        )
        q = np.asarray(inputs.q[tokens, heads], np.float64)
        s = np.einsum("qgd,td->qgt", q, k) * work.head_dim**-0.5
        position = stored - q.shape[0] + np.arange(q.shape[0])
        s = np.where(np.arange(stored) <= position[:, None, None], s, -np.inf)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        right = np.einsum("qgt,td->qgd", p / p.sum(axis=-1, keepdims=True), v)
        wrong = np.abs(np.asarray(got[tokens, heads], np.float64) - right)
        error = (wrong / np.abs(right).max(axis=-1, keepdims=True)).max()
        worst = max(worst, error) if error == error else float("nan")
    return float(worst)


def transposed(inputs: Inputs, order: tuple[int, ...]) -> Inputs:
    """Pages [N, Hkv, P, D] in the order that a peer wants, and table entries that are all pages."""
    move = jax.jit(lambda x: x.transpose(order))
    tables = jax.numpy.minimum(inputs.tables, inputs.k_pages.shape[0] - 1)
    return dataclasses.replace(
        inputs, k_pages=move(inputs.k_pages), v_pages=move(inputs.v_pages), tables=tables
    )
