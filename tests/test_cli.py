"""The command line, run as a user runs it: text, summary, errors of one line, exit codes."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest
from click.testing import CliRunner
from flax import nnx

from paxattn import cli, display
from paxattn.cli.plan import Bytes
from paxattn.models import GenerationConfig, bundled, load
from paxattn.sampling import SamplingParams


@pytest.fixture(autouse=True)
def _processes_share_what_they_compile(monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


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


@pytest.mark.parametrize(
    ("given", "used"),
    [((), {"temperature": 0.6, "top_p": 0.9}), (("--top-k", "3"), {"top_k": 3})],
)
def test_without_sampling_options_the_checkpoint_says_how(monkeypatch, capfd, given, used):
    asked = []
    module = sys.modules["paxattn.cli.generate"]
    advice = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
    changed = dataclasses.replace(load(bundled()), generation_config=advice)
    monkeypatch.setattr(module, "load_checkpoint", lambda *args: changed)

    def stream(*args, sampling, **options):
        asked.extend(sampling)
        sys.exit()

    monkeypatch.setattr(module, "stream", stream)
    in_process("generate", "-p", "a", "-p", "b", *given, monkeypatch=monkeypatch, capfd=capfd)
    assert asked == [SamplingParams(seed=seed, **used) for seed in (0, 1)]


def test_generate_from_standard_input():
    text = "def \u20ac(x):\nclass A:\n\n"
    out = run("generate", "-n", "8", "--page-size", "8", stdin=text, PYTHONIOENCODING="latin-1")
    assert out.returncode == 0, out.stderr
    assert "=== 1: def ?(x):" in out.stdout
    assert "=== 2: class A:" in out.stdout
    for word in ("tokens/s", "pages", "utilization", "ended by"):
        assert word in out.stderr


def test_samples_speculation_and_beams(monkeypatch, capfd):
    both = ("-p", "import os\nimport sys\n\ndef f", "-p", "import os\nimport sys\n\ndef g")
    options = ("generate", "-n", "8", "--page-size", "4", "-t", "0.8", "--seed", "1", *both)
    options = (*options, "--num-samples", "2", "--draft", "ngram", "--draft-branches", "2")
    code, alike, err = in_process(*options, monkeypatch=monkeypatch, capfd=capfd)
    assert (code, "found in shared pages" in err) == (0, True), err
    assert "=== 4: import os" in alike
    code, out, err = in_process(*options, "--no-prefix-cache", monkeypatch=monkeypatch, capfd=capfd)
    assert (code, out, "found in shared pages" in err) == (0, alike, False), err
    shared = ("generate", "-n", "8", "-p", "import os")
    code, out, err = in_process(
        *shared, "--num-beams", "2", "--early-stopping", "never",
        monkeypatch=monkeypatch, capfd=capfd,
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith("import os")
    assert "utilization" in err
    code, _, err = in_process(
        *shared, "--num-beams", "2", "--draft", "ngram", monkeypatch=monkeypatch, capfd=capfd
    )
    assert code == 2
    assert "--num-beams does not go with sampling options" in err
    code, _, err = in_process(
        *shared, "--num-beams", "2", "--top-k", "3", monkeypatch=monkeypatch, capfd=capfd
    )
    assert (code, "--num-beams does not go with sampling options" in err) == (2, True)
    code, _, err = in_process(
        *shared, "--length-penalty", "2", monkeypatch=monkeypatch, capfd=capfd
    )
    assert (code, "need --num-beams" in err) == (2, True)


PLAN = ("plan", "--layers", "2", "--kv-heads", "2", "--head-dim", "64", "--memory", "1GB")


@pytest.mark.parametrize(
    "args",
    [("generate", "-q", "-n", "8", "--page-size", "8", "-p", "a", "-p", "b"), PLAN, ("doctor",)],
    ids=lambda args: args[0],
)
def test_a_reader_that_goes_away_is_no_error(args):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "paxattn", *args]
    out = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=240, check=False
    )
    os.close(write)
    assert (out.returncode, out.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("generate <&-", 2, "paxattn: error: no prompt: the input is empty"),
        ("generate --prompt-file - <&-", 2, "paxattn: error: no prompt: the input is empty"),
        (" ".join(PLAN) + " >&- <&-", 0, ""),
        ("generate -q -n 8 --page-size 8 -p a -p b >&-", 0, ""),
        ("doctor 2>&- >&-", 0, ""),
    ],
)
def test_closed_standard_streams(command, code, error):
    out = subprocess.run(
        ["bash", "-c", f'"$0" -m paxattn {command}', sys.executable],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert out.returncode == code, out.stderr
    assert out.stdout == ""
    assert out.stderr.startswith(error)
    assert len(out.stderr.splitlines()) == bool(error)


@pytest.mark.parametrize("command", ["doctor", "generate -p x"])
def test_a_platform_that_is_not_there(command):
    out = run(*command.split(), JAX_PLATFORMS="cuda")
    if out.returncode == 0:
        pytest.skip("this machine has it")
    assert out.returncode == 1
    assert out.stderr.startswith("paxattn: error: JAX found no device: ")
    assert len(out.stderr.splitlines()) == 1


def test_seeds_wrap_and_prompts_may_begin_with_a_byte_order_mark(tmp_path, monkeypatch, capfd):
    path = tmp_path / "prompts"
    path.write_bytes("\ufeffdef f(x):\nclass A:\n".encode())
    asked = []
    command = sys.modules["paxattn.cli.generate"]
    real = command.stream
    monkeypatch.setattr(
        command,
        "stream",
        lambda *args, **options: asked.append((args, options)) or real(*args, **options),
    )
    args = ("generate", "-q", "-n", "8", "--page-size", "8", "--prompt-file", str(path))
    code, out, err = in_process(
        *args, "--seed", str(2**32 - 1), monkeypatch=monkeypatch, capfd=capfd
    )
    assert (code, err) == (0, "")
    assert out.startswith("=== 1: def f(x):\n")
    (_, texts), options = asked[0]
    assert texts == ["def f(x):", "class A:"]
    assert [params.seed for params in options["sampling"]] == [2**32 - 1, 0]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("9007199254740993", 2**53 + 1),
        ("1.1GB", 1_100_000_000),
        ("0.3KiB", 307),
        ("2.5 TiB", 5 * 2**39),
        ("9223372036854775807B", 2**63 - 1),
    ],
)
def test_sizes_are_exact(size, expected):
    assert Bytes().convert(size, None, None) == expected


def test_speed_counts_the_tokens_of_a_time_and_no_others(monkeypatch):
    clock = []
    monkeypatch.setattr(display.time, "perf_counter", lambda: clock[-1])
    clock.append(0.0)
    report = display.Report(3)
    # The prompts at 5 s, a first read of decode steps (compiled meanwhile) at 9 s, two more.
    reads = [(5.0, [1, 1, 1]), (9.0, [2, 2, 2]), (10.0, [2, 0, 2]), (11.0, [None, None, 1])]
    for when, counts in reads:
        clock.append(when)
        for index, count in enumerate(counts):
            if count is not None:
                report.add(index, count, None)
    assert [when for when, _ in report.reads] == [5.0, 9.0, 10.0, 11.0]
    assert report.decoded() == (5, 2.0)
    short = display.Report(1)
    short.add(0, 1, None)
    short.add(0, 2, "length")
    assert short.decoded() == (0, 0.0)


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
    assert "1 of 1 completions ran out of pages: raise --num-pages above 1 (" in err


def test_alone_it_shows_the_help(monkeypatch, capfd):
    code, out, err = in_process(monkeypatch=monkeypatch, capfd=capfd)
    assert (code, err) == (0, "")
    assert "Usage:" in out


def test_doctor(monkeypatch, capfd):
    code, out, _ = in_process("doctor", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0
    for word in ("jax", "flax", "reference", "mosaic_gpu", "mosaic_tpu", "python"):
        assert word in out
    assert "Your table: ~" in out  # pasted into a report, it does not name the user


def test_plan(monkeypatch, capfd):
    args = (*PLAN, "--dtype", "float16", "--max-len", "1024")
    code, out, err = in_process(*args, monkeypatch=monkeypatch, capfd=capfd)
    assert (code, err) == (0, "")
    assert not any(line.endswith(" ") for line in out.splitlines())
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "KV per token 1,024 bytes (float16)" in lines
    assert "sequences 256 tokens each, at most 1,024" in lines
    assert "1,024 reserved for each 953 25.0%" in lines  # 10**9 // (1,024 * 1,024)


@pytest.mark.parametrize("command", ["generate", "serve", "bench", "plan", "doctor"])
def test_help(command):
    result = CliRunner().invoke(cli.cli, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert "\\b" not in result.output
    if command == "plan":
        words = " ".join(result.output.split())
        assert "[default: a quarter of --max-len]" in words
        assert "[default: the model's positions, or 2048]" in words
    if command != "doctor":  # examples, a line each
        assert f"\n    paxattn {command} " in result.output


BAD = [
    (["generate", "-p", "x", "--top-p", "2"], "top_p=2.0 must be a number in (0, 1]"),
    (
        ["generate", "-p", "x", "-t", "-1"],
        "temperature=-1.0 must be 0 (greedy) or a positive number",
    ),
    (["generate", "-p", "x", "-m", ""], "'--model' / '-m': is empty"),
    (["generate", "-p", "x", "--seed", "-1"], "-1 is not in the range 0<=x<=4294967295"),
    (["generate", "-p", "\udcff"], "prompts[0] is '\\udcff': no valid text"),
    (["plan", "-m", ""], "'--model' / '-m': is empty"),
    ([*PLAN, "--model", "x"], "--model and --layers both tell the shapes: pass one of them"),
    (["plan", "-m", "x", "--head-dim", "8"], "--model and --head-dim both tell the shapes"),
    ([*PLAN, "--memory", "8388608TiB"], "8388608TiB is more than any device has"),
    ([*PLAN, "--memory", "9" * 5000], "is not a size such as 24GiB"),
    ([*PLAN, "--memory", "1e9"], "'1e9' is not a size such as 24GiB"),
    (["plan"], "pass --model, or all of --layers, --kv-heads and --head-dim"),
    (["generate", "-p", "x", "--page-size", "0"], "0 is not in the range 1<=x<=256"),
    (["generate", "-p", "x", "-n", "5000"], "more than the model's 2048 positions"),
    (["generate", "-p", ""], "prompt 1 is empty"),
    (["generate", "-p", "x", "--draft-tokens", "2"], "--draft-branches need --draft"),
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


def test_bytes_of_weights_are_those_of_the_model(tmp_path, monkeypatch, capfd):
    module = sys.modules["paxattn.cli.plan"]
    checkpoint = load(bundled())
    leaves = jax.tree.leaves(nnx.state(checkpoint.model, nnx.Param))
    name = leaves[0].dtype.name
    assert module._weight_bytes(checkpoint.config, name) == sum(x.nbytes for x in leaves)
    # Of any number of layers: shapes alone are counted.
    fields = json.loads((bundled() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 2**20}))
    command = ("plan", "--model", str(tmp_path), "--memory", "1GB")
    code, _, err = in_process(*command, monkeypatch=monkeypatch, capfd=capfd)
    assert (code, "leaves nothing of memory_bytes=1000000000" in err) == (1, True), err


def test_too_many_samples_are_no_traceback(monkeypatch, capfd):
    command = ("generate", "-p", "x", "--num-samples", "1000000000000")
    code, _, err = in_process(*command, monkeypatch=monkeypatch, capfd=capfd)
    assert (code, len(err.strip().splitlines())) == (1, 1)
    assert "more than an int32 counts" in err
