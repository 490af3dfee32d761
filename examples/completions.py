"""Twenty Python prompts for the bundled checkpoint, and how a completion of one is judged.

Run as a script this greedily completes every prompt with a plain dense forward pass and counts
how many completions are Python. ``PROMPTS`` and ``trim_to_parse`` import neither JAX nor
anything else outside the standard library, so that a test can judge another generator's text.
"""

from __future__ import annotations

import argparse
import ast
import warnings
from pathlib import Path

# No prompt ends in a space: the tokenizer joins a space to the word that follows, so a lone one
# at the end is a token that was hardly ever seen before a word.
PROMPTS: list[str] = [
    "def read_config(path):\n",
    "class Stack:\n",
    "for line in open(",
    "import os\nimport sys\n\ndef main():\n",
    "class Point:\n    def __init__(self, x, y):\n",
    "class Node:\n    def __init__(self, parent):\n",
    "class Queue:\n    def is_empty(self):\n        return",
    "if __name__ == '__main__':\n",
    "try:\n    import",
    "with open(filename, 'rb') as f:\n",
    "class Connection:\n    def close(self):\n        if self.",
    "class ParseError(Exception):\n",
    "class Cache(dict):\n    def get(self, key, default=None):\n        try:\n",
    "def readlines(fp):\n    while True:\n        line =",
    "def add_argument(parser, name):\n    if not",
    "class Thread:\n    @property\n    def name(self):\n",
    "class Token:\n    def __repr__(self):\n        return",
    "def unique(items):\n    result = []\n    for item in items:\n",
    "from collections import",
    'def send_request(host, method, url):\n    """',
]


def _statements(source: str) -> int | None:
    """How many statements ``source`` holds, or None where it is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in a string is still a string
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree))


def trim_to_parse(text: str, prompt: str = "") -> str | None:
    """The longest run of leading lines of ``text`` that is Python, or None if there is none.

    Generation stops at a token count, nearly always in the middle of something, so a completion
    is judged up to its last complete statement: what follows the last newline is dropped (a name
    cut in half still parses), then further lines until the rest parses. With ``prompt`` (which
    ``text`` starts with), the rest must also reach past the prompt and hold a statement that the
    prompt alone does not: a completion may not pass by being trimmed away.
    """
    least = (_statements(prompt) or 0) + 1
    shortest = len(prompt.rstrip())
    lines = text.split("\n")[:-1]
    while lines:
        kept = "\n".join(lines)
        if len(kept.rstrip()) <= shortest:
            return None
        found = _statements(kept)
        if found is not None and found >= least:
            return kept.rstrip() + "\n"
        lines.pop()
    return None


def complete(folder: Path, prompts: list[str], tokens: int, bos: bool) -> list[str]:
    """Greedy continuations, prompts included, by a whole forward pass for each new token.

    Without a cache, slow and plain on purpose: nothing here is shared with the library that
    the checkpoint is there to test.
    """
    import jax
    import numpy as np
    from train_tiny import CONFIG, hidden_states, linear, load_checkpoint

    params, tokenizer = load_checkpoint(folder)
    ids = [[CONFIG["bos_token_id"]] * bos + tokenizer.encode(prompt).ids for prompt in prompts]
    starts = np.array([len(prompt_ids) for prompt_ids in ids])
    rows = np.zeros((len(ids), starts.max() + tokens), np.int32)
    for row, prompt_ids in zip(rows, ids, strict=True):
        row[: len(prompt_ids)] = prompt_ids
    each, ends, alive = np.arange(len(ids)), starts.copy(), np.ones(len(ids), bool)

    @jax.jit
    def next_ids(rows: jax.Array, last: jax.Array) -> jax.Array:
        states = hidden_states(params, rows)[each, last]
        return linear(states, params["model.embed_tokens.weight"]).argmax(-1)

    for _ in range(tokens):
        new = np.asarray(next_ids(rows, ends - 1))
        alive &= new != CONFIG["eos_token_id"]
        rows[each[alive], ends[alive]] = new[alive]
        ends += alive
    return [
        prompt + tokenizer.decode(row[start:end].tolist())
        for prompt, row, start, end in zip(prompts, rows, starts, ends, strict=True)
    ]


def main() -> None:
    """Complete every prompt with the checkpoint, print the results and the count."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = here.parent / "paxattn" / "checkpoints" / "tiny_python"
    parser.add_argument("--checkpoint", type=Path, default=default, help="Hugging Face folder")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens for each prompt")
    parser.add_argument("--bos", action="store_true", help="start each prompt with <|endoftext|>")
    args = parser.parse_args()

    texts = complete(args.checkpoint, PROMPTS, args.tokens, args.bos)
    parsed = 0
    for prompt, text in zip(PROMPTS, texts, strict=True):
        kept = trim_to_parse(text, prompt)
        parsed += kept is not None
        print(f"--- {'parses' if kept is not None else 'DOES NOT PARSE'}")
        print((text if kept is None else kept).rstrip())
    print(f"=== {parsed} of {len(PROMPTS)} completions parse")


if __name__ == "__main__":
    main()
