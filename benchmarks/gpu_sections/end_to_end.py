"""`generate` beside Hugging Face's, on the same weights: tokens per second of a whole call.

Greedy, prompts of 128 tokens, 128 new ones, batch 64. Hugging Face's static cache runs as it comes
without compilation, and then as it compiles itself on a GPU.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpu_sections import step
from gpu_sections.context import Context
from paxattn import generate
from paxattn.models import Decoder
from paxattn.models.config import read_config
from paxattn.models.weights import Weights

LLAMA_8B = dict(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
)  # fmt: skip
TINY = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip


def run(context: Context) -> None:
    batch, prompt, new = (2, 8, 8) if context.tiny else (64, 128, 128)
    shape = TINY if context.tiny else LLAMA_8B
    prompts = np.random.default_rng(0).integers(5, shape["vocab_size"], (batch, prompt))
    try:
        theirs = _their_model(shape, context.tiny)
    except Exception as error:  # whatever keeps it from running: ours is measured without it
        context.emit({"generate": "transformers", "skipped": " ".join(str(error).split())[:200]})
        theirs = None
    ours = _our_model(context, theirs)

    def paxattn() -> np.ndarray:
        out = generate(ours, prompts.tolist(), max_new_tokens=new)
        return np.array([completion.tokens for completion in out.completions])

    runs: dict[str, Callable[[], np.ndarray]] = {"paxattn": paxattn}
    if theirs is not None:
        runs |= _their_runs(theirs, prompts, new, context.tiny)
    tokens: dict[str, np.ndarray] = {}
    for name, call in runs.items():
        case = {"generate": name, "batch": batch, "prompt": prompt, "new": new}
        context.attempt(case, partial(_time, name, call, batch * new, tokens))


def _their_model(shape: dict[str, int], tiny: bool) -> Any:
    """A random Llama of Hugging Face's."""
    import torch
    import transformers

    torch.manual_seed(0)
    dtype = torch.float32 if tiny else torch.bfloat16
    with torch.device("cpu" if tiny else "cuda"):
        config = transformers.LlamaConfig(**shape)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _our_model(context: Context, theirs: Any) -> Decoder:
    """The same weights; random ones without Hugging Face."""
    dtype = "float32" if context.tiny else "bfloat16"
    if theirs is None:
        config = step.TINY if context.tiny else step.LLAMA_8B
        model = Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)
    else:
        with tempfile.TemporaryDirectory() as folder:
            theirs.config.save_pretrained(folder)
            config = read_config(Path(folder))
        model = Decoder(config, dtype=dtype, weights=_weights_of(theirs))
    model.implementation = (context.implementation, "reference")
    return model


# Ours: theirs of which it is made, without what their names begin with in a layer.
PARTS = {
    "embed": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
    "qkv": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    "o": ("self_attn.o_proj.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
    "attention_norm": ("input_layernorm.weight",),
    "mlp_norm": ("post_attention_layernorm.weight",),
}


def _weights_of(model: Any) -> Weights:
    """A Llama's weights, where they are: by way of files, 16 GB would take most of the time."""
    tensors = {name: jnp.from_dlpack(x.detach()) for name, x in model.state_dict().items()}

    def weights(name: str, layer: int | None, shape: tuple[int, ...]) -> jax.Array:
        place = "" if layer is None else f"model.layers.{layer}."
        parts = [tensors[place + part] for part in PARTS[name]]
        if name == "qkv":  # by KV head: its queries, its key, its value
            parts = [part.reshape(shape[0], -1, *shape[2:]) for part in parts]
            return jnp.concatenate(parts, axis=1)
        return jnp.stack(parts) if len(parts) > 1 else parts[0]

    return weights


def _their_runs(model: Any, prompts: np.ndarray, new: int, tiny: bool) -> dict[str, Callable]:
    import torch
    import transformers

    options = dict(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )

    def static(**more: Any) -> np.ndarray:
        ids = torch.tensor(prompts, device=model.device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), cache_implementation="static",
                **options, **more,
            )  # fmt: skip
        return out[:, prompts.shape[1] :].cpu().numpy()

    def paged() -> np.ndarray:
        page, tokens = 32, prompts.shape[1] + new
        before = model.config._attn_implementation
        model.set_attn_implementation("paged|sdpa")
        try:
            out = model.generate_batch(
                prompts.tolist(),
                generation_config=transformers.GenerationConfig(
                    max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
                ),
                continuous_batching_config=transformers.ContinuousBatchingConfig(
                    block_size=page,
                    num_blocks=len(prompts) * -(-tokens // page) + 8,
                    max_batch_tokens=max(512, len(prompts)),
                ),
                warmup=False,
            )
        finally:
            model.set_attn_implementation(before)
        found = {tuple(one.prompt_ids): one.generated_tokens for one in out.values()}
        return np.array([found[tuple(prompt)] for prompt in prompts.tolist()])

    runs = {
        "transformers, static cache": partial(static, disable_compile=True),
        "transformers, paged|sdpa": paged,
    }
    return runs if tiny else runs | {"transformers, static cache, compiled": static}


def _time(
    name: str, call: Callable[[], np.ndarray], num_tokens: int, tokens: dict[str, np.ndarray]
) -> dict:
    call()  # compile, warm up
    start = time.perf_counter()
    tokens[name] = call()
    seconds = time.perf_counter() - start
    ours = tokens.get("paxattn")  # (another process may have made it, which a peer took along)
    same = None if ours is None else float((tokens[name] == ours).mean())
    return {"tokens/s": num_tokens / seconds, "same tokens": same}
