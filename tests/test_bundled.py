"""The checkpoint that comes with the package: small, and it writes Python."""

import sys
from pathlib import Path

import pytest

from paxattn.generate import generate
from paxattn.models import bundled, load

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from completions import PROMPTS, trim_to_parse


@pytest.fixture(scope="module")
def checkpoint():
    return load(bundled(), dtype="float32")


def test_it_is_small_and_of_the_promised_shape(checkpoint):
    assert sum(path.stat().st_size for path in bundled().iterdir()) < 8_000_000
    config = checkpoint.config
    assert (config.head_dim, config.max_positions) == (64, 2048)
    assert config.num_kv_heads < config.num_heads
    assert checkpoint.stop_token_ids == (checkpoint.tokenizer.token_to_id("<|endoftext|>"),)


def test_most_completions_parse(checkpoint):
    out = generate(
        checkpoint.model,
        PROMPTS,
        tokenizer=checkpoint.tokenizer,
        stop_token_ids=checkpoint.stop_token_ids,
        max_new_tokens=96,
    )
    parsed = [
        trim_to_parse(prompt + completion.text, prompt) is not None
        for prompt, completion in zip(PROMPTS, out.completions, strict=True)
    ]
    assert len(PROMPTS) == 20
    assert sum(parsed) >= 12


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("x = 1\ny = (\n", "x = 1\n"),
        ("def f(:\n", None),
        ("def f():\n    return 1\n    if\n", "def f():\n    return 1\n"),
    ],
)
def test_trim_to_parse(text, kept):
    assert trim_to_parse(text, "") == kept
