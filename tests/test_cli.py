"""The command line, run as a user runs it: text, summary, errors of one line, exit codes."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from paxattn import cli
from paxattn.models import bundled


def run(*args, stdin=None, **env):
    return subprocess.run(
        [sys.executable, "-m", "paxattn", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **env},
        check=False,
    )


def in_process(*args, stdin=None, monkeypatch=None, capfd=None):
    """`main` without starting a new interpreter: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["paxattn", *args])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    out, err = capfd.readouterr()
    return code, out, err


def test_generate_from_standard_input_and_a_closed_pipe():
    out = run("generate", "-n", "8", "--page-size", "8", stdin="def f(x):\nclass A:\n\n")
    assert out.returncode == 0, out.stderr
    assert "=== 1: def f(x):" in out.stdout
    assert "=== 2: class A:" in out.stdout
    for word in ("tokens/s", "pages", "utilization", "ended by"):
        assert word in out.stderr
    # A reader that goes away is no error.
    script = f'"{sys.executable}" -m paxattn generate -n 8 --page-size 8 -p a -p b | true'
    piped = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, timeout=240
    )
    assert piped.returncode == 0, piped.stderr
    assert "Traceback" not in piped.stderr


def test_quiet_prints_only_the_text(monkeypatch, capfd):
    args = ("generate", "-q", "-n", "8", "--page-size", "8", "-p", "def f(x):", "--seed", "3")
    code, out, err = in_process(*args, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0
    assert out.startswith("def f(x):")
    assert err == ""


def test_running_out_of_pages_is_said(monkeypatch, capfd):
    args = ("generate", "-q", "-n", "16", "--page-size", "8", "-p", "def f(x):", "--num-pages", "1")
    code, out, err = in_process(*args, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 1
    assert out.startswith("def f(x):")
    assert "1 of 1 prompts ran out of pages: raise --num-pages above 1" in err


def test_alone_it_shows_the_help(monkeypatch, capfd):
    code, out, err = in_process(monkeypatch=monkeypatch, capfd=capfd)
    assert (code, err) == (0, "")
    assert "Usage:" in out


def test_doctor(monkeypatch, capfd):
    code, out, _ = in_process("doctor", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0
    for word in ("jax", "flax", "reference", "mosaic_gpu", "mosaic_tpu", "python"):
        assert word in out


@pytest.mark.parametrize("command", ["generate", "plan", "doctor"])
def test_help(command):
    result = CliRunner().invoke(cli.cli, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


BAD = [
    (["generate", "-p", "x", "--top-p", "2"], "top_p=2.0 must be in (0, 1]"),
    (["generate", "-p", "x", "-t", "-1"], "temperature=-1.0 must be a number >= 0"),
    (["generate", "-p", "x", "--page-size", "0"], "0 is not in the range 1<=x<=256"),
    (["generate", "-p", "x", "-n", "5000"], "more than the model's 2048 positions"),
    (["generate", "-p", ""], "prompt 0 is empty"),
    (["generate", "-p", "x", "-m", "/no/such/place"], "/no/such/place: no such directory"),
    (["generate", "--prompt-file", "/no/such/file"], "/no/such/file"),
    (["generate", "-p", "x", "--nonsense"], "--nonsense"),
    (["generate", "-p", "x", "--stop", ""], "must be a list of non-empty strings"),
    (["frobnicate"], "frobnicate"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=lambda value: str(value)[-30:])
def test_bad_input_gets_one_line(args, message, monkeypatch, capfd):
    code, out, err = in_process(*args, monkeypatch=monkeypatch, capfd=capfd)
    assert code in (1, 2)
    assert out == ""
    assert message in err
    assert err.startswith("paxattn: error: ")
    assert len(err.strip().splitlines()) == 1


def test_prompts_that_are_not_text(tmp_path, monkeypatch, capfd):
    path = tmp_path / "prompts"
    path.write_bytes(b"\xff\xfe\x00bad")
    code, _, err = in_process(
        "generate", "--prompt-file", str(path), monkeypatch=monkeypatch, capfd=capfd
    )
    assert code == 2
    assert "is not UTF-8 text" in err


def test_a_checkpoint_without_tokenizer(tmp_path, monkeypatch, capfd):
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).write_bytes((bundled() / name).read_bytes())
    code, _, err = in_process(
        "generate", "-p", "x", "-m", str(tmp_path), monkeypatch=monkeypatch, capfd=capfd
    )
    assert code == 2
    assert "has no tokenizer.json" in err


def test_a_damaged_checkpoint(tmp_path, monkeypatch, capfd):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((bundled() / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    code, _, err = in_process(
        "generate", "-p", "x", "-m", str(tmp_path), monkeypatch=monkeypatch, capfd=capfd
    )
    assert code == 1
    assert "model.safetensors" in err
    assert len(err.strip().splitlines()) == 1
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gpt9"}))
    _, _, err = in_process(
        "generate", "-p", "x", "-m", str(tmp_path), monkeypatch=monkeypatch, capfd=capfd
    )
    assert "gpt9" in err
