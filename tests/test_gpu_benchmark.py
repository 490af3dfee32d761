"""`benchmarks/gpu.py`, as far as it goes without a GPU: every section at toy sizes."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
SECTIONS = ("device", "decode", "correct", "prefill", "step", "end_to_end")

# A script with a section whose second measurement takes the process along, or never ends.
FAULTY = """
import os, sys, time, types
sys.path[:0] = [{folder!r}]
import gpu

def run(context):
    context.emit(dict(what="version"))
    context.attempt(dict(n=1), lambda: dict(ok=True))
    context.attempt(dict(n=2), lambda: {fault})
    context.attempt(dict(n=3), lambda: dict(ok=True))

sys.modules["gpu_sections.faulty"] = module = types.ModuleType("gpu_sections.faulty")
module.run = run
gpu.main()
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu

    return gpu


@pytest.mark.parametrize(
    ("fault", "told"),
    [("os.abort()", "exit code -6"), ("time.sleep(500)", "killed: no end after")],
    ids=["fault", "hang"],
)
def test_what_takes_the_process_along_is_named_and_the_rest_is_measured(
    fault, told, gpu, monkeypatch, tmp_path
):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(folder=str(SCRIPT.parent), fault=fault))
    monkeypatch.setattr(gpu, "__file__", str(script))
    args = argparse.Namespace(peers=tmp_path, tiny=True)
    result = gpu.run_section("faulty", tmp_path / "rows", args, seconds=200, patience=3)
    assert "ended" not in result
    version, first, second, third = result["rows"]
    assert version == {"what": "version"}
    assert first == {"n": 1, "ok": True}
    assert third == {"n": 3, "ok": True}
    assert second["n"] == 2
    assert second["error"].startswith(told)


def test_a_fault_behind_rows_that_are_emitted_while_measuring_is_the_measurements(
    gpu, monkeypatch, tmp_path
):
    script = tmp_path / "faulty.py"
    fault = "(context.emit(dict(kernel=1)), os.abort())"
    script.write_text(FAULTY.format(folder=str(SCRIPT.parent), fault=fault))
    monkeypatch.setattr(gpu, "__file__", str(script))
    args = argparse.Namespace(peers=tmp_path, tiny=True)
    result = gpu.run_section("faulty", tmp_path / "rows", args, seconds=200, patience=30)
    assert "ended" not in result
    assert [row for row in result["rows"] if row.get("n", 1) > 1] == [
        {"n": 2, "error": "exit code -6"},
        {"n": 3, "ok": True},
    ]


def test_a_section_that_fails_outside_of_measurements_is_not_begun_again(
    gpu, monkeypatch, tmp_path
):
    script = tmp_path / "faulty.py"
    text = FAULTY.format(folder=str(SCRIPT.parent), fault="{}")
    script.write_text(text.replace("    context.attempt", "    os.abort()\n    context.attempt", 1))
    monkeypatch.setattr(gpu, "__file__", str(script))
    started = []
    popen = gpu.subprocess.Popen
    monkeypatch.setattr(
        gpu.subprocess, "Popen", lambda *args, **more: started.append(0) or popen(*args, **more)
    )
    args = argparse.Namespace(peers=tmp_path, tiny=True)
    result = gpu.run_section("faulty", tmp_path / "rows", args, seconds=200, patience=30)
    assert result["ended"] == "exit code -6"
    assert result["rows"] == [{"what": "version"}]
    assert len(started) == 1


def test_a_section_that_never_begins_to_measure_is_killed_and_named(gpu, tmp_path):
    args = argparse.Namespace(peers=tmp_path, tiny=True)
    result = gpu.run_section("step", tmp_path / "rows", args, seconds=0.3, patience=1)
    assert result["ended"].startswith("killed")
    assert result["rows"] == []


@pytest.mark.variants
@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_at_toy_sizes(name, tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, SCRIPT, "--tiny", "--only", name, "--out", out]
    command += ["--peers", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results.pop("tiny") is True
    (result,) = results.values()
    assert "ended" not in result
    assert result["rows"]
    own = [row for row in result["rows"] if row.get("attention", "paxattn") == "paxattn"]
    assert not [row for row in own if "error" in row and row.get("what") != "nvidia-smi"]
    if name in ("decode", "prefill"):
        errors = [row["relative error"] for row in result["rows"] if "us" in row]
        assert errors
        assert max(errors) < 1e-4
    if name == "correct":
        assert all(row["right"] == "yes" for row in result["rows"])


def test_all_sections_are_tried(gpu):
    assert tuple(gpu.SECONDS) == SECTIONS
