"""What quantised pages cost in quality, and why scales are for each token and head.

    python benchmarks/quantized_pages.py scales [--tokens 16384]
    python benchmarks/quantized_pages.py pages [--tokens 32768]

The bundled checkpoint in float32 on files of the Python library that it was not trained on.

scales: keys and values as its layers make them, quantised and restored in the places where they
would be stored, with scales for different groups of numbers; pages of 16 tokens. The errors are
relative root mean squares: of keys, of values, and of what attention makes of both. Scales for a
page or a channel are those of pages that are full already, the best that such a scheme could have.

pages: pages of each dtype through the library itself, every token read back from the pages.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _common import save, show
from jax import lax

from paxattn import load
from paxattn.models import bundled
from paxattn.page_table import init_page_table, reserve
from paxattn.quantized import PAGE_DTYPES
from paxattn.ragged import ragged_batch

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from train_tiny import held_out, read_corpus, token_stream

ROWS, CONTEXT, PAGE = 8, 512, 16
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
# Numbers that share a scale: axes of [rows, pages, tokens of a page, heads, head_dim].
SHARED = {
    "token and head": (4,),
    "page and head": (2, 4),
    "page and channel": (2,),
    "token": (3, 4),
}
SCHEMES = {  # of keys, of values
    "token and head": ("token and head", "token and head"),
    "the same, f32 scales": ("token and head", "token and head"),
    "page and head": ("page and head", "page and head"),
    "keys: page and channel": ("page and channel", "token and head"),
    "token, all heads": ("token", "token"),
}


def restored(x, dtype, shared, mantissa_bits):
    """`[T, heads, head_dim]` as it comes out of pages with such scales."""
    blocks = x.reshape(ROWS, -1, PAGE, *x.shape[1:])
    scale = jnp.abs(blocks).max(axis=SHARED[shared], keepdims=True) / LARGEST[dtype]
    # (XLA leaves out a cast to bfloat16 and back.)
    scale = jnp.maximum(lax.reduce_precision(scale, 8, mantissa_bits), 1e-30)
    numbers = jnp.clip(blocks / scale, -LARGEST[dtype], LARGEST[dtype])
    numbers = jnp.round(numbers) if dtype == "int8" else numbers.astype(dtype)
    return (numbers.astype(jnp.float32) * scale).reshape(x.shape)


def dense(q, k, v):
    """Causal attention within each row, `[T, heads, head_dim]` all."""
    q, k, v = (x.reshape(ROWS, CONTEXT, -1, x.shape[-1]) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tri(CONTEXT, dtype=bool), scores, -jnp.inf)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return out.reshape(-1, *out.shape[2:])


def attend(q, k, v, errors, batch, *, layer, change, **_):
    """In place of `nn.attend`; `errors` f32[layers, 3, 2] are squares, of errors and of all."""
    if change is None:
        return dense(q, k, v), errors
    (of_k, of_v), dtype, bits = change
    new_k, new_v = restored(k, dtype, of_k, bits), restored(v, dtype, of_v, bits)
    out = dense(q, new_k, new_v)
    exact = dense(q, k, v)
    pairs = (k, new_k), (v, new_v), (exact, out)
    squares = jnp.stack([jnp.stack([jnp.sum((a - b) ** 2), jnp.sum(a**2)]) for a, b in pairs])
    return out, errors.at[layer].add(squares)


def step_of(tokens):
    """The batch of a prefill of all rows, and pages enough for it."""
    rows, context = tokens.shape
    pages = rows * context // PAGE
    table = init_page_table(
        num_pages=pages, page_size=PAGE, max_seqs=rows, max_pages_per_seq=context // PAGE
    )
    lens = jnp.full((rows,), context, jnp.int32)
    table, _, _ = reserve(table, lens, max_new_pages=context // PAGE)
    return ragged_batch(table, lens, num_tokens=tokens.size, max_q_len=context), pages


def nats(model, hidden, tokens):
    """The loss of every token but the first of each row, summed, f32[]."""
    hidden = hidden.reshape(*tokens.shape, -1)[:, :-1]
    logits = model.logits(hidden.reshape(-1, hidden.shape[-1]))
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:].reshape(-1, 1), axis=1)
    return -found.sum()


@partial(jax.jit, static_argnames="change")
def with_scheme(model, tokens, change):
    batch, _ = step_of(tokens)
    errors = jnp.zeros((model.config.num_layers, 3, 2))
    hidden, errors = model(tokens.ravel(), batch, errors, attend=partial(attend, change=change))
    return nats(model, hidden, tokens), errors


@partial(jax.jit, static_argnames="dtype")
def with_pages(model, tokens, dtype):
    batch, pages = step_of(tokens)
    cache = model.init_cache(num_pages=pages, page_size=PAGE, dtype=dtype)
    hidden, _ = model(tokens.ravel(), batch, cache)
    return nats(model, hidden, tokens)


def compare_schemes(model, windows):
    def measure(change):
        found = [with_scheme(model, jnp.asarray(x), change) for x in windows]
        loss = sum(float(loss) for loss, _ in found) / (len(windows) * ROWS * (CONTEXT - 1))
        squares = np.sum([np.asarray(errors) for _, errors in found], axis=(0, 1))
        return loss, squares

    exact, _ = measure(None)
    rows = []
    for dtype in LARGEST:
        for name, groups in SCHEMES.items():
            loss, squares = measure((groups, dtype, 23 if "f32" in name else 7))
            k, v, out = (float((a / b) ** 0.5) for a, b in squares)
            rows.append(
                {
                    "numbers": dtype,
                    "a scale for each": name,
                    "error of keys %": 100 * k,
                    "of values %": 100 * v,
                    "of attention %": 100 * out,
                    "loss": loss,
                    "more than float32 %": 100 * (loss / exact - 1),
                }
            )
    return rows


def compare_pages(model, windows, context):
    count = sum(x.shape[0] * (x.shape[1] - 1) for x in windows)
    loss = {
        dtype: sum(float(with_pages(model, jnp.asarray(x), dtype)) for x in windows) / count
        for dtype in PAGE_DTYPES
    }
    size = {
        dtype: jax.eval_shape(
            lambda dtype=dtype: model.init_cache(num_pages=1, page_size=PAGE, dtype=dtype)
        ).bytes_per_token
        for dtype in PAGE_DTYPES
    }
    return [
        {
            "pages": dtype,
            "context": context,
            "loss": loss[dtype],
            "more than bfloat16 %": 100 * (loss[dtype] / loss["bfloat16"] - 1),
            "bytes per token": size[dtype],
            "tokens in the same bytes": size["bfloat16"] / size[dtype],
        }
        for dtype in PAGE_DTYPES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("scales", "pages"))
    parser.add_argument("--tokens", type=int, default=16_384)
    args = parser.parse_args()
    checkpoint = load(bundled(), dtype="float32")
    texts = [text for path, text in read_corpus(any_corpus=True) if held_out(path)]
    stream = token_stream(checkpoint.tokenizer, texts)[: args.tokens]
    print(f"{len(stream):,} held-out tokens")
    model, windows = checkpoint.model, stream.reshape(-1, ROWS, CONTEXT)
    if args.part == "scales":
        rows = compare_schemes(model, windows)
    else:
        rows = compare_pages(model, windows, CONTEXT)
        longest = checkpoint.config.max_positions
        rows += compare_pages(model, stream.reshape(-1, 2, longest), longest)
    show(args.part, rows)
    print(save(f"quantized_{args.part}", rows, tokens=len(stream)))


if __name__ == "__main__":
    main()
