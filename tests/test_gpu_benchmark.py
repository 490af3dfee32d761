"""`benchmarks/gpu.py`, as far as it goes without a GPU: every section at toy sizes."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def test_a_section_that_hangs_is_killed_and_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu

    args = argparse.Namespace(peers=tmp_path, tiny=True)
    result = gpu.run_section("step", tmp_path / "rows", args, seconds=0.3)
    assert result["ended"].startswith("killed after")
    assert result["rows"] == []


@pytest.mark.slow
def test_every_section_at_toy_sizes(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, SCRIPT, "--tiny", "--out", out, "--peers", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results.pop("tiny") is True
    for name, result in results.items():
        assert "ended" not in result, name
        assert result["rows"], name
        own = [row for row in result["rows"] if row.get("attention", "paxattn") == "paxattn"]
        failed = [row for row in own if "error" in row and row.get("what") != "nvidia-smi"]
        assert not failed, name
    for row in (*results["decode"]["rows"], *results["prefill"]["rows"]):
        assert row.get("max error", 0) < 1e-4, row
    assert all(row["right"] == "yes" for row in results["correct"]["rows"])
