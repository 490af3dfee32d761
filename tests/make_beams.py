"""Record beam searches of transformers on the tiny checkpoints of `make_fixtures`.

Run it where torch and transformers are installed, after ``make_fixtures.py``:

    python tests/make_beams.py [name ...]

writes ``tests/fixtures/<name>/beams.npz``: for every combination below, one prompt at a time, the
sequences and scores that ``generate(num_beams=K, num_return_sequences=K)`` returns.
"""

import itertools
import sys

import numpy as np
from make_fixtures import FIXTURES

NAMES = ("llama3", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss")
NUM_BEAMS = (2, 4, 8)
EARLY_STOPPING = (False, True, "never")
LENGTH_PENALTY = (1.0, 0.0, 2.0)
NEW_TOKENS = 20
STOP_IDS = (3, 17, 40, 41)
CASES = list(itertools.product(NUM_BEAMS, EARLY_STOPPING, LENGTH_PENALTY))


def search(model, prompt, num_beams, early_stopping, length_penalty, stop_ids=STOP_IDS):
    """Tokens (without the prompt, a final stop token included) and scores, best first."""
    import torch

    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        early_stopping=early_stopping,
        length_penalty=length_penalty,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    lens = (out.beam_indices >= 0).sum(1).tolist()
    sequences = [
        row[len(prompt) : len(prompt) + n].tolist()
        for row, n in zip(out.sequences, lens, strict=True)
    ]
    return sequences, out.sequences_scores.tolist()


def main(names):
    from transformers import AutoModelForCausalLM

    for name in names or NAMES:
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype="float32").eval()
        known = np.load(FIXTURES / name / "expected.npz")
        prompts = np.split(known["prompts"], np.cumsum(known["prompt_lens"])[:-1])
        found = [search(model, prompt.tolist(), *case) for case in CASES for prompt in prompts]
        beams = max(NUM_BEAMS)
        tokens = np.zeros((len(found), beams, NEW_TOKENS), np.uint8)
        lens = np.zeros((len(found), beams), np.uint8)
        scores = np.zeros((len(found), beams), np.float32)
        for i, (sequences, score) in enumerate(found):
            scores[i, : len(score)] = score
            for j, sequence in enumerate(sequences):
                lens[i, j] = len(sequence)
                tokens[i, j, : len(sequence)] = sequence
        np.savez_compressed(FIXTURES / name / "beams.npz", tokens=tokens, lens=lens, scores=scores)
        print(f"{name}: {len(found)} searches, mean length {lens[lens > 0].mean():.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
