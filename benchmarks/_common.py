"""What the benchmarks share: machine and versions, interleaved medians, JSON and tables."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """CPU, devices and versions: a figure means nothing without them."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu or platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "paxattn": metadata.version("paxattn") if _installed("paxattn") else "source",
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 1),  # of others too: figures taken at 2 and more mislead
    }


def interleaved(
    functions: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds per call, taking turns so that drift of the machine meets all of them alike.

    A function may return the seconds itself (when part of its work is not to be timed); otherwise
    the whole call is timed until its result is ready. Each is called once before, to compile.

    Returns:
      Per name: `median`, `low` and `high` (10th and 90th percentile) and `min`.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            out = jax.block_until_ready(function())
            took = time.perf_counter() - start
            times[name].append(out if isinstance(out, float) else took)
    return {name: _summary(sorted(values)) for name, values in times.items()}


def save(name: str, rows: Sequence[Mapping[str, Any]], **extra: Any) -> Path:
    """Writes `results/NAME.json`; other versions' entries in the file are kept."""
    RESULTS.mkdir(exist_ok=True)
    here = machine()
    entry = {"machine": here, **extra, "rows": list(rows)}
    kept = [x for x in _saved(name) if not _same(x, here)]
    kept = sorted([*kept, entry], key=lambda x: (x["machine"]["jax"], x["machine"]["cpu"]))
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return path


def rows_of_this_machine(name: str) -> list[dict[str, Any]]:
    """The rows that `save` has written here with these versions, or none."""
    here = machine()
    return next((x["rows"] for x in _saved(name) if _same(x, here)), [])


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows as a table; floats with three significant figures."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console().print(table)


def _saved(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def _same(entry: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    keys = ("cpu", "cores", "devices", "python", "jax")
    return all(entry["machine"].get(key) == here[key] for key in keys)


def _summary(times: list[float]) -> dict[str, float]:
    def at(fraction: float) -> float:
        return times[min(len(times) - 1, int(fraction * len(times)))]

    return {
        "median": statistics.median(times),
        "low": at(0.1),
        "high": at(0.9),
        "min": times[0],
    }


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
