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
TWO_ROPES = dict(
    full_attention=dict(rope_type="linear", rope_theta=1000.0, factor=2.0),
    sliding_attention=dict(rope_type="default", rope_theta=100.0),
)
GPT_OSS = dict(
    num_hidden_layers=2,
    intermediate_size=64,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    swiglu_limit=1.5,
    sliding_window=10,
    rope_parameters=dict(
        rope_type="yarn",
        rope_theta=200.0,
        factor=4.0,
        beta_fast=8.0,
        beta_slow=1.0,
        truncate=False,
        original_max_position_embeddings=32,
    ),
)
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
    "gemma2": (
        "gemma2",
        dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=9)
        | dict(attn_logit_softcapping=4.0, final_logit_softcapping=2.0),
        {},
    ),
    "gemma3": (
        "gemma3_text",
        dict(head_dim=16, query_pre_attn_scalar=12, sliding_window=11, rope_parameters=TWO_ROPES)
        | dict(layer_types=[*SLIDING[1:], SLIDING[0]], tie_word_embeddings=False),
        {},
    ),
    "gpt_oss": ("gpt_oss", GPT_OSS, {}),
    "gpt_oss_mxfp4": ("gpt_oss", GPT_OSS, {}),  # as the released ones are
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
                noise = ("gemma" not in name) + 0.3 * noise
            elif value.ndim == 3:  # experts: the input's axis comes before the output's
                noise = noise * 1.5 * value.shape[-2] ** -0.5
            elif value.ndim == 2:
                noise = noise * 1.5 * value.shape[-1] ** -0.5
            if "gemma" in name and "embed" in key:  # which are scaled, and would say all there is
                noise = noise * 0.3
            value.copy_(noise.half().float())
    return model


def quantize_experts(model, seed=0):
    """Give a gpt-oss random experts that are exact in MXFP4; returns their blocks and scales."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng, packed = np.random.default_rng(seed), {}
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                num, size_in, size_out = value.shape
                shape = (num, size_out, size_in // 32)
                blocks = torch.tensor(rng.integers(0, 256, (*shape, 16), np.uint8))
                scales = torch.tensor(rng.integers(122, 125, shape, np.uint8))
                value.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
                packed |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    return packed


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


def replace_experts(directory, packed):
    """Rewrite a checkpoint with packed experts."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    plain = {name.rsplit("_", 1)[0] for name in packed}
    tensors = {name: value for name, value in load_file(path).items() if name not in plain}
    save_file(tensors | packed, path, metadata={"format": "pt"})
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"] = dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


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
        packed = quantize_experts(model, seed + 1) if name.endswith("mxfp4") else {}
        prompts = random_prompts(seed, COMMON["vocab_size"])
        prefill, tokens, decode = expected(model, prompts)
        save_checkpoint(model, FIXTURES / name, **save_options)
        if packed:
            replace_experts(FIXTURES / name, packed)
        if name in ("llama3", "gpt_oss_mxfp4"):
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
