"""Everything there is to measure on a GPU, most telling first, in less than eight minutes.

    python benchmarks/gpu.py [--only decode,prefill] [--minutes 8] [--peers DIR] [--out FILE]
    python benchmarks/gpu.py --tiny      the same at toy sizes with the reference, on any machine

device      versions, and the read and copy bandwidth that the card reaches here
decode      the decode grid beside every peer that is present, each result checked
correct     every kernel against float64, with memory poisoned before
prefill     TFLOP/s of whole prompts and of a late chunk
step        the jitted decode step of a model of Llama-3-8B's shape, and where its time goes
end_to_end  `generate` beside Hugging Face on the same weights

Nothing is installed. A peer is timed if it can be imported, or lies in the folder of peers (see
`gpu_sections/torch_peers.py`); one that is not is named as skipped. Every section is a process of
its own with a time limit, since a kernel that hangs or faults takes its process along; its rows are
written as they come, and the JSON after every section.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = {
    "device": 20,
    "decode": 130,
    "correct": 70,
    "prefill": 50,
    "step": 100,
    "end_to_end": 100,
}


def run_section(name: str, rows: Path, args: argparse.Namespace, seconds: float) -> dict:
    """In a process of its own. Returns its rows, its seconds, and how it ended if not well."""
    command = [sys.executable, __file__, "--section", name, "--rows", str(rows)]
    # The section stops by itself before it is killed.
    command += ["--seconds", str(0.9 * seconds), "--peers", str(args.peers)]
    command += ["--tiny"] if args.tiny else []
    begun, ended = time.monotonic(), ""
    process = subprocess.Popen(command, env=os.environ | environment(args.tiny))
    try:
        code = process.wait(seconds)
        ended = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        ended = f"killed after {seconds:.0f} s"
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    took = round(time.monotonic() - begun, 1)
    return {"seconds": took, "rows": found, **({"ended": ended} if ended else {})}


def environment(tiny: bool) -> dict[str, str]:
    root = str(HERE.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # Torch needs room beside JAX.
    settings = {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}
    return settings | ({"JAX_PLATFORMS": "cpu"} if tiny else {"FLASHINFER_DISABLE_JIT": "1"})


def child(args: argparse.Namespace) -> None:
    sys.path[:0] = [str(args.peers / "site")] if (args.peers / "site").exists() else []
    from gpu_sections.context import Context

    from paxattn.attention import tuning

    with args.rows.open("w") as file:

        def emit(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        context = Context(
            tiny=args.tiny,
            peers=args.peers,
            emit=emit,
            until=time.monotonic() + args.seconds,
        )
        section = importlib.import_module(f"gpu_sections.{args.section}")
        with tuning.use(tuning.read(tuning.PACKAGE_TABLE)):  # (not that of whoever measures)
            section.run(context)


def tables(name: str, result: dict) -> None:
    """Rows with the same columns make a table."""
    from _common import show

    groups: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault(tuple(row), []).append(row)
    for rows in groups.values():
        show(name, rows)
    print(f"{name}: {result['seconds']} s {result.get('ended', '')}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECONDS), help="sections, joined by commas")
    parser.add_argument("--minutes", type=float, default=7.8, help="for all sections together")
    parser.add_argument("--peers", type=Path, default=HERE / "peers", help="folder of peers")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, the reference, no GPU")
    for name in ("section", "rows", "seconds"):  # (of a process for a section)
        kind = {"rows": Path, "seconds": float}.get(name, str)
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("COLUMNS", "150")  # (tables, where there is no terminal)
    if args.section:
        return child(args)
    sections = args.only.split(",")
    if unknown := set(sections) - set(SECONDS):
        parser.error(f"no section {', '.join(sorted(unknown))}: choose from {', '.join(SECONDS)}")
    until = time.monotonic() + 60 * args.minutes
    results: dict[str, dict] = {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in sections:
            left = until - time.monotonic()
            seconds = left if args.tiny else min(SECONDS[name], left)
            if seconds < 5:
                results[name] = {"seconds": 0, "rows": [], "ended": "not begun: no time left"}
            else:
                results[name] = run_section(name, Path(folder, name), args, seconds)
            args.out.write_text(json.dumps({"tiny": args.tiny, **results}, indent=1) + "\n")
            tables(name, results[name])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
