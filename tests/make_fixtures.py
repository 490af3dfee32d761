"""Record what transformers computes for tiny random checkpoints of every supported family.

Run it where torch and transformers are installed:

    python tests/make_fixtures.py [name ...]

writes ``tests/fixtures/<name>/``: the checkpoint as ``save_pretrained`` wrote it (float16, which
the weights are exactly) and ``expected.npz`` with ragged prompts, the greedy continuation of each,
and the float32 logits after every token. The live comparison test uses the same functions with
other sizes and seeds.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
STEPS = 64
PROMPT_LENS = (5, 19, 33)

COMMON = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
SLIDING = ["full_attention", "sliding_attention", "sliding_attention"]
# name: (model_type, changes to COMMON, arguments of save_pretrained)
FAMILIES = {
    "llama2": ("llama", dict(num_key_value_heads=4), {}),
    "llama3": ("llama", dict(rope_parameters=LLAMA3_ROPE), dict(max_shard_size="30KB")),
    "llama3_tied": (
        "llama",
        dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, head_dim=16),
        {},
    ),
    "mistral": ("mistral", dict(sliding_window=12), {}),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True), {}),
    "qwen2_sliding": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=9, max_window_layers=1, layer_types=SLIDING),
        {},
    ),
    "qwen3": ("qwen3", dict(head_dim=16), {}),
}


def random_model(name, seed=0, **changes):
    """A transformers model with random weights, norms and biases, all exact in float16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, options, _ = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **{**COMMON, **options, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in key:
                noise = 1 + 0.3 * noise
            elif value.ndim == 2:
                noise = noise * 1.5 * value.shape[-1] ** -0.5
            value.copy_(noise.half().float())
    return model


def expected(model, prompts, steps=STEPS):
    """Greedy continuations and logits, one prompt at a time, so that nothing is padded.

    Returns arrays: prefill f32[sum of prompt lengths, V], tokens i64[R, steps], and decode
    f32[steps, R, V], the logits after each of those tokens.
    """
    import torch

    prefill, tokens, decode = [], [], []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            prefill.append(model(ids).logits[0].numpy())
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=steps + 1,
                output_logits=True,
                return_dict_in_generate=True,
            )
            tokens.append(out.sequences[0, len(prompt) : -1].numpy())
            decode.append(torch.cat(out.logits[1:]).numpy())
    return np.concatenate(prefill), np.stack(tokens), np.stack(decode, axis=1)


def random_prompts(seed, vocab_size, lens=PROMPT_LENS):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lens]


def save_checkpoint(model, directory, **options):
    """As save_pretrained writes it, in float16."""
    shutil.rmtree(directory, ignore_errors=True)
    model.half().save_pretrained(directory, **options)


def to_old_spelling(path):
    """Rewrite a config.json as transformers 4 wrote it."""
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = rope
    fields["torch_dtype"] = fields.pop("dtype")
    path.write_text(json.dumps(fields, indent=2) + "\n")


def main(names):
    for seed, (name, (_, _, save_options)) in enumerate(FAMILIES.items()):
        if names and name not in names:
            continue
        model = random_model(name, seed)
        prompts = random_prompts(seed, COMMON["vocab_size"])
        prefill, tokens, decode = expected(model, prompts)
        save_checkpoint(model, FIXTURES / name, **save_options)
        if name == "llama3":
            to_old_spelling(FIXTURES / name / "config.json")
        np.savez_compressed(
            FIXTURES / name / "expected.npz",
            prompts=np.concatenate(prompts).astype(np.uint8),
            prompt_lens=np.array(PROMPT_LENS),
            tokens=tokens.astype(np.uint8),
            prefill=prefill,
            decode=decode,
        )
        top = np.sort(decode, axis=-1)
        margin = (top[..., -1] - top[..., -2]).min()
        distinct = [len(set(row.tolist())) for row in tokens]
        print(f"{name}: logits std {decode.std():.2f}, least margin {margin:.4f}, {distinct=}")


if __name__ == "__main__":
    main(sys.argv[1:])
