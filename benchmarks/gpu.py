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
its own, since a kernel that hangs or faults takes its process along: what it was measuring is named
as failed, and another process goes on behind it. Rows are written as they come, and the JSON after
every section. The sections that are asked for share the time by their weights, and what one leaves
goes to those after it.
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
SECONDS = {  # their weights, and what the longest single measurement of each may take
    "device": (20, 30),
    "decode": (150, 40),
    "correct": (70, 40),
    "prefill": (50, 40),
    "step": (90, 120),
    "end_to_end": (90, 120),
}


def run_section(
    name: str, journal: Path, args: argparse.Namespace, seconds: float, patience: float
) -> dict:
    """In a process of its own, and in another behind a measurement that took the first along.

    Returns:
        Its rows, its seconds, and how it ended if not well.
    """
    begun = time.monotonic()
    until = begun + seconds
    journal.touch()
    while True:
        done = _attempts(journal)[0]
        ended = _run_process(name, journal, args, until, patience)
        now_done, row = _attempts(journal)
        if row is not None:
            now_done += 1
            with journal.open("a") as file:
                failed = {"row": row | {"error": ended or "it ended"}, "of": row, "found": None}
                file.write(json.dumps(failed) + "\n")
        if not ended or now_done == done or until - time.monotonic() < 5:
            break
    rows: list[dict] = []
    for line in _lines(journal):
        if "row" in line and line["row"] not in rows:  # (each process begins with the same ones)
            rows.append(line["row"])
    took = round(time.monotonic() - begun, 1)
    return {"seconds": took, "rows": rows, **({"ended": ended} if ended else {})}


def _run_process(
    name: str, journal: Path, args: argparse.Namespace, until: float, patience: float
) -> str:
    """How it ended; "": well."""
    # The section stops by itself before it is killed.
    seconds = until - time.monotonic()
    command = [sys.executable, __file__, "--section", name, "--journal", str(journal)]
    command += ["--seconds", str(0.9 * seconds), "--peers", str(args.peers)]
    command += ["--tiny"] if args.tiny else []
    process = subprocess.Popen(command, env=os.environ | environment(args.tiny))
    size, since = -1, time.monotonic()
    while True:
        try:
            code = process.wait(0.2)
            return f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if journal.stat().st_size != size:
            size, since = journal.stat().st_size, now
            measuring = _attempts(journal)[1] is not None
        if now < until and (not measuring or now - since < patience):
            continue
        process.kill()
        process.wait()
        return f"killed: no end after {now - since:.0f} s"


def _lines(journal: Path) -> list[dict]:
    """What is complete of a journal; see `Context`."""
    text = journal.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _attempts(journal: Path) -> tuple[int, dict | None]:
    """How many measurements have ended, and the row of the one that has not, if there is one."""
    ended, begun = 0, None
    for line in _lines(journal):
        if "begin" in line:
            begun = line["begin"]
        elif "of" in line:
            ended, begun = ended + 1, None
    return ended, begun


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

    known = [line for line in _lines(args.journal) if "of" in line]
    with args.journal.open("a") as file:

        def note(line: dict) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        context = Context(
            tiny=args.tiny,
            peers=args.peers,
            note=note,
            until=time.monotonic() + args.seconds,
            known={json.dumps(line["of"]): line["found"] for line in known},
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
    for name in ("section", "journal", "seconds"):  # (of a process for a section)
        kind = {"journal": Path, "seconds": float}.get(name, str)
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
        for i, name in enumerate(sections):
            weight, patience = SECONDS[name]
            left = until - time.monotonic()
            share = left * weight / sum(SECONDS[other][0] for other in sections[i:])
            seconds, patience = (left, left) if args.tiny else (share, patience)
            if seconds < 5:
                results[name] = {"seconds": 0, "rows": [], "ended": "not begun: no time left"}
            else:
                results[name] = run_section(name, Path(folder, name), args, seconds, patience)
            args.out.write_text(json.dumps({"tiny": args.tiny, **results}, indent=1) + "\n")
            tables(name, results[name])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
