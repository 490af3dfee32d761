"""Train the checkpoint bundled with paxattn: a 3.8M-parameter Llama that writes Python.

    python train_tiny.py --out ../paxattn/checkpoints/tiny_python --state /tmp/tiny --minutes 80

The text is the Python standard library's own source, so nothing is downloaded and the licence
(PSF) is the interpreter's. What makes a run repeatable is that the text is pinned: the script
refuses any Python whose library does not hash to ``CORPUS_SHA256`` (``--any-corpus`` overrides).

Everything is sized for a few CPU cores and an hour or so. The schedule follows the clock rather
than a step count: the learning rate warms up, stays flat, and falls linearly to zero over the
last ``DECAY`` of ``--minutes``, so that a slow machine gets a finished model, only a weaker one.
SIGTERM brings that decay forward instead of throwing the run away, and a run that was killed
outright resumes from ``--state``.

On Linux most of a step's time can go to the kernel handing out zeroed pages, because glibc
returns every large buffer at once. With the following the steps measured 1.5 to 2 times faster:

    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:\
glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456:glibc.malloc.arena_max=1
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import platform
import signal
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from safetensors.numpy import load_file, save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

Params = dict[str, jax.Array]

PYTHON = "3.11.7"
CORPUS_FILES = 601
CORPUS_SHA256 = "e320fd2144373d9635a6685a295bbdff30fc2c4a8e663b17fddf3deb94f0be2b"
EOT = "<|endoftext|>"

# Left out: test suites (17 MB of repetition that would outweigh the library), what the build
# writes (differs between machines), and files that are tables rather than code.
SKIP_FOLDERS = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings",
    "pydoc_data", "lib-dynload", "__phello__",
}  # fmt: skip
SKIP_FILES = {"html/entities.py", "locale.py", "stringprep.py", "this.py", "__hello__.py"}
SKIP_PREFIXES = ("_sysconfigdata", "config-")

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

PEAK_LR, WARMUP, DECAY = 3e-3, 0.02, 0.6  # the last two are fractions of the run
# (fraction of the run at which it starts, sequence length): the last part reaches the full
# context so that positions up to 2,048 have been seen; earlier, short rows learn more a minute.
STAGES = ((0.0, 512), (0.80, 1024), (0.90, 2048))


# ---------------------------------------------------------------------------------- the text


def read_corpus(any_corpus: bool) -> list[tuple[str, str]]:
    """The library's source as sorted (path, text), checked against the pinned hash."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files, digest = [], hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if SKIP_FOLDERS.intersection(name.parts) or name.as_posix() in SKIP_FILES:
            continue
        if name.parts[0].startswith(SKIP_PREFIXES):
            continue
        data = path.read_bytes()
        digest.update(f"{name.as_posix()} {hashlib.sha256(data).hexdigest()}\n".encode())
        try:
            files.append((name.as_posix(), data.decode().replace("\r\n", "\n")))
        except UnicodeDecodeError:
            continue
    found = (platform.python_version(), len(files), digest.hexdigest())
    if found != (PYTHON, CORPUS_FILES, CORPUS_SHA256):
        message = (
            f"the bundled checkpoint was trained on CPython {PYTHON}'s library ({CORPUS_FILES} "
            f"files, sha256 {CORPUS_SHA256});\nthis is {found[0]} ({found[1]} files, sha256 "
            f"{found[2]})."
        )
        if not any_corpus:
            sys.exit(message + "\nPass --any-corpus to train on it all the same.")
        print("warning: " + message)
    return files


def held_out(path: str) -> bool:
    """Whether a file is kept from training: one in twenty, by the hash of its path."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) % 20 == 0


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE whose words are cut for code.

    A run of newlines and a run of two or more spaces are each one word, apart from what they
    touch: an indent is one token, and a prompt that ends at a line's end is cut as in training.
    """
    words = r"\n+| {2,}| ?[\p{L}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[AddedToken(EOT, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one row of ids, with the end-of-text token before, between and after."""
    ids = [0]
    for encoding in tokenizer.encode_batch(texts):
        ids += [*encoding.ids, 0]
    return np.asarray(ids, np.int32)


# --------------------------------------------------------------------------------- the model


def init_params(seed: int) -> Params:
    """Parameters in float32, flat, under the names and shapes Hugging Face gives them."""
    c, rng, params = CONFIG, np.random.default_rng(seed), {}
    hidden, inter, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    q_size, kv_size = (
        c[f"num_{kind}_heads"] * c["head_dim"] for kind in ("attention", "key_value")
    )

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        values = rng.normal(0.0, c["initializer_range"] * scale, (rows, columns))
        params[f"model.{name}.weight"] = jnp.asarray(values, jnp.float32)

    matrix("embed_tokens", c["vocab_size"], hidden)
    out_scale = 1 / math.sqrt(2 * layers)  # keeps the residual stream's size at the start
    for i in range(layers):
        matrix(f"layers.{i}.self_attn.q_proj", q_size, hidden)
        matrix(f"layers.{i}.self_attn.k_proj", kv_size, hidden)
        matrix(f"layers.{i}.self_attn.v_proj", kv_size, hidden)
        matrix(f"layers.{i}.self_attn.o_proj", hidden, q_size, out_scale)
        matrix(f"layers.{i}.mlp.gate_proj", inter, hidden)
        matrix(f"layers.{i}.mlp.up_proj", inter, hidden)
        matrix(f"layers.{i}.mlp.down_proj", hidden, inter, out_scale)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            params[f"model.layers.{i}.{norm}.weight"] = jnp.ones(hidden)
    params["model.norm.weight"] = jnp.ones(hidden)
    return params


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Contract one axis of each matrix in bfloat16, adding up in float32."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


@jax.custom_vjp
def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x @ weight.T`` with bfloat16 operands and a float32 result, in both directions.

    Left to itself JAX differentiates this into products of mixed type, which XLA runs in
    float32 on CPU; these products ran 1.5 to 3 times faster on cores that have AMX.
    """
    return _linear_fwd(x, weight)[0]


def _linear_fwd(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x, weight = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    return _dot(x, weight, (1, 1)), (x, weight)


def _linear_bwd(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    grad = grad.astype(jnp.bfloat16)
    return _dot(grad, weight, (1, 0)), _dot(grad, x, (0, 0))


linear.defvjp(_linear_fwd, _linear_bwd)


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Root-mean-square normalization over the last axis."""
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(mean + CONFIG["rms_norm_eps"]) * weight


def rope(x: jax.Array) -> jax.Array:
    """Rotary embedding of [batch, time, heads, head_dim], halves paired as Hugging Face does."""
    size = x.shape[-1]
    inverse = CONFIG["rope_theta"] ** (-np.arange(0, size, 2) / size)
    angles = np.outer(np.arange(x.shape[1]), inverse)[None, :, None, :]
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, block: int = 256) -> jax.Array:
    """Causal grouped-query attention over blocks of queries, each against its past only.

    Blocks skip what lies wholly in the future (half the work at 2,048) and bound the scores'
    memory. A key head's queries are laid side by side, so that every product is one plain
    matrix product per (row, key head).
    """
    batch, length, heads, size = q.shape
    kv_heads = k.shape[2]
    group, block = heads // kv_heads, min(block, length)
    q = q.reshape(batch, length, kv_heads, group, size).transpose(0, 2, 1, 3, 4) * size**-0.5
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    out = []
    for start in range(0, length, block):
        end = min(start + block, length)
        shape = (batch, kv_heads, end - start, group)
        rows = q[:, :, start:end].reshape(batch, kv_heads, -1, size)
        scores = jnp.matmul(rows, k[..., :end]).reshape(*shape, end)
        mask = np.tril(np.ones((end - start, end), bool), start)[:, None]
        scores = jnp.where(mask, scores, -1e30)
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        values = jnp.matmul(weights.reshape(batch, kv_heads, -1, end), v[:, :, :end])
        out.append(values.reshape(*shape, size) / total)
    return jnp.concatenate(out, axis=2).transpose(0, 2, 1, 3, 4).reshape(batch, length, -1)


def hidden_states(params: Params, tokens: jax.Array) -> jax.Array:
    """The decoder's final normalized states, [batch, time, hidden], for ids [batch, time]."""
    batch, length = tokens.shape
    heads, kv_heads, size = (
        CONFIG[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    x = params["model.embed_tokens.weight"][tokens].reshape(batch * length, -1)
    for i in range(CONFIG["num_hidden_layers"]):
        p = functools.partial(lambda i, name: params[f"model.layers.{i}.{name}.weight"], i)
        y = rms_norm(x, p("input_layernorm"))
        q = linear(y, p("self_attn.q_proj")).reshape(batch, length, heads, size)
        k = linear(y, p("self_attn.k_proj")).reshape(batch, length, kv_heads, size)
        v = linear(y, p("self_attn.v_proj")).reshape(batch, length, kv_heads, size)
        mixed = attention(rope(q), rope(k), v).reshape(batch * length, -1)
        x = x + linear(mixed, p("self_attn.o_proj"))
        y = rms_norm(x, p("post_attention_layernorm"))
        gated = jax.nn.silu(linear(y, p("mlp.gate_proj"))) * linear(y, p("mlp.up_proj"))
        x = x + linear(gated, p("mlp.down_proj"))
    return rms_norm(x, params["model.norm.weight"]).reshape(batch, length, -1)


@jax.checkpoint
def _nats(states: jax.Array, targets: jax.Array, embedding: jax.Array) -> jax.Array:
    """Summed cross-entropy. The logits are worked out anew going back, not kept."""
    logits = linear(states, embedding)
    hit = jnp.arange(logits.shape[-1]) == targets[:, None]  # a gather's gradient would scatter
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0), axis=-1))


def mean_nats(params: Params, rows: jax.Array) -> jax.Array:
    """Mean nats per token of predicting each id of ``rows`` from those before it."""
    states = hidden_states(params, rows[:, :-1])
    targets = rows[:, 1:].reshape(-1)
    states = states.reshape(targets.size, -1)
    return _nats(states, targets, params["model.embed_tokens.weight"]) / targets.size


# ------------------------------------------------------------------------------ the schedule


def rate(done: float) -> float:
    """The learning rate once a fraction ``done`` of the run's time is over."""
    return PEAK_LR * max(0.0, min(1.0, done / WARMUP, (1.0 - done) / DECAY))


def make_optimizer() -> optax.GradientTransformation:
    """Clipped AdamW whose learning rate is an input, decaying the matrices only."""

    @optax.inject_hyperparams
    def adamw(learning_rate: float) -> optax.GradientTransformation:
        mask = functools.partial(jax.tree.map, lambda p: p.ndim == 2)
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=mask),
        )

    return adamw(learning_rate=0.0)


def batch_at(stream: np.ndarray, step: int, batch: int, length: int, seed: int) -> np.ndarray:
    """The rows of a step: windows of the stream at places drawn from (seed, step) alone."""
    starts = np.random.default_rng([seed, step]).integers(0, len(stream) - length, batch)
    return stream[starts[:, None] + np.arange(length + 1)]


def evaluate(params: Params, stream: np.ndarray, length: int, limit: int | None = None) -> float:
    """Mean nats per token over the stream in windows of ``length``, as if in bfloat16."""
    params = {name: p.astype(jnp.bfloat16).astype(jnp.float32) for name, p in params.items()}
    count = min((len(stream) - 1) // length, limit or len(stream))
    pick = np.linspace(0, (len(stream) - 1) // length - 1, count).astype(int)
    batch, loss = max(1, 4096 // length), jax.jit(mean_nats)
    total = 0.0
    for i in range(0, count - count % batch, batch):
        rows = stream[pick[i : i + batch, None] * length + np.arange(length + 1)]
        total += float(loss(params, rows))
    return total / (count // batch)


# ----------------------------------------------------------------------------------- the files


def save_checkpoint(folder: Path, params: Params, tokenizer: Tokenizer) -> None:
    """Write the Hugging Face folder: bfloat16 weights, configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.asarray(p.astype(jnp.bfloat16)) for name, p in params.items()}
    partial = folder / "model.safetensors.partial"  # renamed when whole: never half a checkpoint
    partial.write_bytes(save(tensors, metadata={"format": "pt"}))
    partial.replace(folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOT,
        "eos_token": EOT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False}
    for name, value in (
        ("config.json", CONFIG),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")


def load_checkpoint(folder: Path) -> tuple[Params, Tokenizer]:
    """Read what ``save_checkpoint`` wrote, the weights as float32."""
    tensors = load_file(folder / "model.safetensors")
    params = {name: jnp.asarray(t, jnp.float32) for name, t in tensors.items()}
    return params, Tokenizer.from_file(str(folder / "tokenizer.json"))


def save_state(path: Path, tree: Any, progress: dict[str, Any]) -> None:
    """Write parameters, optimizer state and progress, replacing the last in one step."""
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    partial = path.with_name("partial.npz")
    np.savez(partial, progress=json.dumps(progress), **leaves)
    partial.replace(path)


def load_state(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Read what ``save_state`` wrote, in the shape of ``like``."""
    data = np.load(path)
    leaves, shape = jax.tree.flatten(like)
    leaves = [jnp.asarray(data[f"leaf{i}"]) for i in range(len(leaves))]
    return jax.tree.unflatten(shape, leaves), json.loads(str(data["progress"]))


# ------------------------------------------------------------------------------------ the run


def cpu_name() -> str:
    """The processor's name where Linux says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def train(args: argparse.Namespace) -> None:
    """Train until the time is up, saving on the way, and write the checkpoint."""
    files = read_corpus(args.any_corpus)
    train_texts = [text for path, text in files if not held_out(path)]
    test_texts = [text for path, text in files if held_out(path)]
    tokenizer = train_tokenizer(iter(train_texts))
    stream, test = token_stream(tokenizer, train_texts), token_stream(tokenizer, test_texts)
    test_bytes = sum(len(text.encode()) for text in test_texts)

    params = init_params(args.seed)
    optimizer = make_optimizer()
    state = optimizer.init(params)
    args.state.mkdir(parents=True, exist_ok=True)
    progress: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "log": []}
    if (args.state / "state.npz").exists():
        (params, state), progress = load_state(args.state / "state.npz", (params, state))
    count = sum(p.size for p in params.values())
    print(f"{count:,} parameters; {len(stream):,} training and {len(test):,} held-out tokens")

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: Any, rows: jax.Array) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(mean_nats)(params, rows)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def save_both() -> None:
        save_state(args.state / "state.npz", (params, state), progress)
        save_checkpoint(args.state / "latest", params, tokenizer)

    total = args.minutes * 60.0
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
    saved = last = time.monotonic()
    losses: list[float] = []
    while True:
        now = time.monotonic()
        progress["seconds"] += now - last
        last = now
        done = progress["seconds"] / total
        if stops and done < 0.9:  # asked to stop: skip to the last tenth of a shorter run
            total, done = progress["seconds"] / 0.9, 0.9
        if done >= 1.0:
            break
        length = [size for start, size in STAGES if start <= done][-1]
        rows = batch_at(stream, progress["step"], args.tokens // length, length, args.seed)
        state.hyperparams["learning_rate"] = jnp.float32(rate(done))
        params, state, loss = update(params, state, rows)
        losses.append(float(loss))
        progress["step"] += 1
        progress["tokens"] += rows.shape[0] * length
        if time.monotonic() - saved > args.save_minutes * 60:
            saved = time.monotonic()
            entry = {
                "minutes": round(progress["seconds"] / 60, 1),
                "step": progress["step"],
                "tokens": progress["tokens"],
                "length": length,
                "train_nats": round(float(np.mean(losses)), 4),
                "held_out_nats": round(evaluate(params, test, 512, 64), 4),
            }
            losses = []
            progress["log"].append(entry)
            print(json.dumps(entry), flush=True)
            save_both()
    save_both()
    save_checkpoint(args.out, params, tokenizer)
    per_token = {str(length): evaluate(params, test, length) for length in (512, 2048)}
    bits = {
        length: nats * (len(test) - 1) / math.log(2) / test_bytes
        for length, nats in per_token.items()
    }
    report = {
        "parameters": count,
        "corpus": f"CPython {platform.python_version()} standard library, {len(files)} files",
        "corpus_tokens": len(stream),
        "steps": progress["step"],
        "tokens": progress["tokens"],
        "minutes": round(progress["seconds"] / 60, 1),
        "machine": f"{os.cpu_count()} cores, {cpu_name()}, {args.note}".rstrip(", "),
        "jax": jax.__version__,
        "held_out_files": len(test_texts),
        "held_out_tokens": len(test),
        "held_out_bytes": test_bytes,
        "held_out_nats_per_token": {k: round(v, 4) for k, v in per_token.items()},
        "held_out_bits_per_byte": {k: round(v, 4) for k, v in bits.items()},
        "seed": args.seed,
        "tokens_per_step": args.tokens,
        "log": progress["log"],
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "log"}, indent=1))


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--state", type=Path, required=True, help="folder to resume from")
    parser.add_argument("--minutes", type=float, default=80.0, help="time to train for")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between saves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="words to add to the report's machine")
    parser.add_argument("--any-corpus", action="store_true", help="train on any Python's library")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
