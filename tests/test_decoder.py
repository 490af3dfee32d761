"""The decoder: against recorded transformers outputs, and its own properties."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from make_fixtures import FAMILIES, FIXTURES
from model_steps import UNOPTIMISED, plan, teacher_forced

from paxattn.models import Decoder, DecoderConfig, Experts, load
from paxattn.models.weights import project

SMALL = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)

MIXED = replace(
    SMALL,
    experts=Experts(num_experts=8, per_token=2),
    windows=(3, 0, 3),
    sinks=True,
    soft_cap=5.0,
    o_bias=True,
    out_norms=True,
)


def numpy_decoder(config, seed=0, **options):
    """Random weights without compiling a random number generator for every shape."""
    rng = np.random.default_rng(seed)
    return Decoder(
        config,
        weights=lambda name, layer, shape: rng.normal(size=shape).astype(np.float32),
        **options,
    )


def recorded(name):
    arrays = np.load(FIXTURES / name / "expected.npz")
    prompts = np.split(arrays["prompts"], np.cumsum(arrays["prompt_lens"])[:-1])
    return prompts, arrays["tokens"], arrays["prefill"], arrays["decode"]


def fixture_model(name, **options):
    return load(FIXTURES / name, **{"dtype": jnp.float32, **options}).model


def assert_same_logits(found, expected, tokens):
    """Within 2e-4, and greedy decoding would have chosen the recorded tokens."""
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=2e-4)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=2e-4)
    # After each token comes the next one.
    np.testing.assert_array_equal(found[1][:-1].argmax(-1).T, tokens[:, 1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name):
    prompts, tokens, prefill, decode = recorded(name)
    assert tokens.shape == (3, 64)
    stacked = name in ("llama3", "qwen2_sliding")  # one with a window per layer, one without
    model = fixture_model(name, stacked=stacked)
    assert isinstance(model.kernels["qkv"], tuple) != stacked
    found = teacher_forced(model, prompts, tokens, padding=[0] * 7)
    assert_same_logits(found, (prefill, decode), tokens)
    last = np.cumsum([len(prompt) for prompt in prompts]) - 1
    np.testing.assert_array_equal(found[0][last].argmax(-1), tokens[:, 0])


def test_padding_tokens_may_hold_anything():
    prompts, tokens, *_ = recorded("llama2")
    model = fixture_model("llama2")
    clean = teacher_forced(model, prompts, tokens, padding=[0] * 7)
    junk = [-1, 64, 2**31 - 1, -(2**31), 5, 10**9, 63]
    found = teacher_forced(model, prompts, tokens, padding=junk)
    for a, b in zip(found[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(found[2]).all()


@pytest.mark.parametrize("stacked", [False, True])
def test_storage(stacked):
    model = Decoder(SMALL, rngs=nnx.Rngs(3), stacked=stacked)
    other = Decoder(SMALL, rngs=nnx.Rngs(3), stacked=not stacked)
    assert isinstance(model.kernels["o"], tuple) != stacked
    for name, kernel in model.kernels.items():
        one = kernel[...][1] if stacked else kernel[1][...]
        two = other.kernels[name][1][...] if stacked else other.kernels[name][...][1]
        np.testing.assert_array_equal(one, two)
    x = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    kernel = model.kernels["gate_up"]
    kernel = kernel[...] if stacked else tuple(one[...] for one in kernel)
    for layer in range(3):
        out = project(x, kernel[layer] if stacked else kernel, jnp.int32(layer))
        expected = np.einsum("ti,abi->tab", x, kernel[layer])
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_default_storage_follows_the_platform(monkeypatch):
    assert isinstance(numpy_decoder(SMALL).kernels["o"], tuple)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert numpy_decoder(SMALL).kernels["o"].shape == (3, 32, 32)


def test_random_weights_are_of_unit_gain_and_reproducible():
    config = replace(SMALL, num_layers=9, qkv_bias=True, qk_norm=True)
    model = Decoder(config, rngs=nnx.Rngs(0))
    kernel = np.stack([one[...] for one in model.kernels["gate_up"]])
    assert abs(kernel.std() * 32**0.5 - 1) < 0.03
    assert len(np.unique(kernel)) > 0.99 * kernel.size  # no two layers alike
    assert (model.vectors["qkv_bias"][...] == 0).all()
    assert (model.vectors["k_norm"][...] == 1).all()
    again = Decoder(config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(again.kernels["gate_up"][8][...], kernel[8])


def equations(jaxpr):
    """Number of equations, nested ones included."""
    inner = [sub for eqn in jaxpr.eqns for sub in jax.extend.core.jaxprs_in_params(eqn.params)]
    return len(jaxpr.eqns) + sum(map(equations, inner))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["plain", "mixed"])
def test_program_does_not_grow_with_depth(stacked, config):
    sizes = dict(page_size=8, num_pages=4)
    batch, _ = plan(jnp.array([2, 3]), num_tokens=8, max_q_len=4, steps=1, **sizes)
    counts = []
    for num_layers in (2, 20):
        windows = (config.windows * num_layers)[:num_layers]
        deep = replace(config, num_layers=num_layers, windows=windows)
        model = numpy_decoder(deep, stacked=stacked)
        jaxpr = jax.make_jaxpr(lambda m, t, b, c: m(t, b, c))(
            model, jnp.zeros(8, jnp.int32), batch, model.init_cache(**sizes)
        )
        counts.append(equations(jaxpr.jaxpr))
    # Separate storage adds a matrix product (and its cast) per layer and matrix, no more.
    assert counts[1] - counts[0] <= (0 if stacked else 18 * 4 * 2)


def test_separate_storage_copies_no_weights():
    """What it is for: XLA on CPU copies the slice of a stack before each product."""
    sizes = dict(page_size=8, num_pages=4)
    batch, _ = plan(np.array([2, 3]), num_tokens=8, max_q_len=4, steps=1, **sizes)
    model = numpy_decoder(replace(SMALL, intermediate_size=400), stacked=False)
    step = jax.jit(
        lambda m, *args: m(*args, attend=lambda q, k, v, cache, batch, **_: (q, cache)),
    )
    compiled = step.lower(model, np.zeros(8, np.int32), batch, model.init_cache(**sizes)).compile()
    # What instructions produce an array as large as one of the MLP's matrices?
    big = re.compile(r"= f32\[(?:2,400,32|800,32|32,800|32,400|400,32)\]\S* ([\w-]+)\(")
    found = set(big.findall(compiled.as_text()))
    assert "parameter" in found
    assert found <= {"parameter", "get-tuple-element", "bitcast"}


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_are_never_copied_as_a_whole(stacked):
    sizes = dict(page_size=8, num_pages=4)
    batch, _ = plan(np.array([2, 3]), num_tokens=8, max_q_len=4, steps=1, **sizes)
    config = replace(MIXED, intermediate_size=400)
    model = numpy_decoder(config, stacked=stacked)
    step = jax.jit(
        lambda m, *args: m(*args, attend=lambda q, k, v, cache, batch, **_: (q, cache)),
    )
    compiled = step.lower(model, np.zeros(8, np.int32), batch, model.init_cache(**sizes)).compile()
    made = re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", compiled.as_text())
    large = {op for shape, op in made if np.prod([*map(int, shape.split(","))]) >= 4 * 400 * 32}
    assert "parameter" in large
    assert large <= {"parameter", "get-tuple-element", "bitcast"}
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2 * 400 * 32 * 4


def dense_attend(q, k, v, cache, batch, *, layer, **options):
    """A `[rows, max_len]` cache in place of pages: what a benchmark would compare with."""
    k_cache, v_cache = cache
    k_cache = k_cache.at[layer, batch.rows, batch.positions].set(k)
    v_cache = v_cache.at[layer, batch.rows, batch.positions].set(v)
    keys, values = k_cache[layer][batch.rows], v_cache[layer][batch.rows]  # [T, max_len, Hkv, D]
    grouped = q.reshape(q.shape[0], keys.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("thgd,tshd->thgs", grouped, keys) * q.shape[-1] ** -0.5
    seen = jnp.arange(keys.shape[1]) <= batch.positions[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30))
    out = jnp.einsum("thgs,tshd->thgd", weights, values)
    return out.reshape(q.shape), (k_cache, v_cache)


def test_attend_can_be_replaced():
    prompts, tokens, prefill, decode = recorded("llama2")
    cache = (jnp.zeros((3, 3, 97, 4, 8)), jnp.zeros((3, 3, 97, 4, 8)))
    found = teacher_forced(
        fixture_model("llama2"), prompts, tokens, cache=cache, attend=dense_attend
    )
    assert_same_logits(found, (prefill, decode), tokens)


@pytest.mark.parametrize("name", ["llama3_tied", "gemma2", "gpt_oss_mxfp4"])
def test_half_precision(name):
    """Computes in the weights' dtype; close to float32."""
    prompts, _, prefill, _ = recorded(name)
    model = fixture_model(name, dtype="bfloat16")
    sizes = dict(page_size=8, num_pages=39)
    lens = np.array([len(prompt) for prompt in prompts])
    batch, _ = plan(lens, num_tokens=64, max_q_len=33, steps=64, **sizes)
    cache = model.init_cache(**sizes)
    packed = np.concatenate([*prompts, [0] * 7]).astype(np.int32)
    step = jax.jit(lambda model, *args: model(*args), compiler_options=UNOPTIMISED)
    hidden, _ = step(model, packed, batch, cache)
    logits = model.logits(hidden)
    for array, dtype in ((model.embed[...], "bfloat16"), (cache.k_pages, "bfloat16")):
        assert array.dtype == dtype
    assert hidden.dtype == "bfloat16"
    assert logits.dtype == "float32"
    assert np.abs(np.asarray(logits)[:57] - prefill).mean() < 0.05


def test_other_weights_of_the_same_shape_do_not_retrace():
    traces = []

    @jax.jit
    def f(model, hidden):
        traces.append(1)
        return model.logits(hidden)

    for seed in range(2):
        f(numpy_decoder(SMALL, seed), jnp.ones((1, 32)))
    assert len(traces) == 1


def test_shapes_without_memory():
    model = nnx.eval_shape(lambda: Decoder(SMALL, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    sizes = {leaf.size for leaf in jax.tree.leaves(model)}
    assert 64 * 32 in sizes
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 2 * 64 * 32 + 32 + 3 * (
        32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 48 + 2 * 32
    )


def test_errors():
    with pytest.raises(ValueError, match=r"pass either rngs=nnx\.Rngs"):
        Decoder(SMALL)
    with pytest.raises(ValueError, match="dtype=int8 must be float32, bfloat16 or float16"):
        Decoder(SMALL, rngs=nnx.Rngs(0), dtype=jnp.int8)
    model = numpy_decoder(SMALL)
    sizes = dict(page_size=8, num_pages=4)
    batch, _ = plan(jnp.array([2, 3]), num_tokens=8, max_q_len=4, steps=1, **sizes)
    with pytest.raises(ValueError, match=r"tokens.shape=\(7,\) must be batch.positions"):
        model(jnp.zeros(7, jnp.int32), batch, model.init_cache(**sizes))
    deeper = numpy_decoder(replace(SMALL, num_layers=4))
    with pytest.raises(ValueError, match=r"the cache has num_layers=4, the model 3: make it with"):
        model(jnp.zeros(8, jnp.int32), batch, deeper.init_cache(**sizes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(soft_cap=0.0), "soft_cap=0.0 must be positive, or None"),
        (dict(sm_scale=-1), "sm_scale=-1 must be positive, or None"),
        (dict(activation="relu"), "activation='relu' is not known; known: silu, gelu_tanh"),
        (dict(num_layers=0), "num_layers=0 must be a positive integer"),
        (dict(num_kv_heads=3), "num_heads=4 must be a multiple of num_kv_heads=3"),
        (dict(head_dim=7), "head_dim=7 must be even"),
        (dict(windows=(1, 2)), r"len\(windows\)=2 must be 0 or num_layers=3"),
        (dict(windows=(1, 2, -1)), r"windows=.* must be below 2\*\*31 and not negative; 0: full"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


FULL, LOCAL = "full_attention", "sliding_attention"
LIVE = [
    ("llama3", dict(num_hidden_layers=2, hidden_size=48, num_attention_heads=6, vocab_size=200)),
    ("llama2", dict(attention_bias=True, hidden_act="gelu_pytorch_tanh")),
    ("mistral", dict(num_hidden_layers=4, num_attention_heads=8, sliding_window=20)),
    ("qwen2_sliding", dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=40)),
    (
        "qwen2",
        dict(rope_parameters=dict(rope_type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.5)),
    ),
    (
        "qwen3",
        dict(num_hidden_layers=4, head_dim=24, hidden_size=40, num_attention_heads=5)
        | dict(num_key_value_heads=5),
    ),
    (  # everything that may be left out, and windows where the family has none by default
        "gemma2",
        dict(attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=20)
        | dict(layer_types=[FULL, LOCAL, LOCAL], tie_word_embeddings=False, attention_bias=True),
    ),
    (
        "gemma2",
        dict(num_hidden_layers=4, hidden_size=48, num_attention_heads=6, num_key_value_heads=1)
        | dict(head_dim=12, query_pre_attn_scalar=100, vocab_size=200, sliding_window=3),
    ),
    (  # the family's own layers and rotations
        "gemma3",
        dict(num_hidden_layers=7, layer_types=None, rope_parameters=None, num_key_value_heads=1)
        | dict(tie_word_embeddings=True, final_logit_softcapping=5.0, attn_logit_softcapping=3.0),
    ),
    (
        "gemma3",
        dict(layer_types=[LOCAL] * 3, head_dim=24, sliding_window=30, attention_bias=True),
    ),
    (
        "gpt_oss",
        dict(num_hidden_layers=3, num_local_experts=5, num_experts_per_tok=3, head_dim=24)
        | dict(num_key_value_heads=1, sliding_window=25, attention_bias=False, swiglu_alpha=1.2)
        | dict(rope_parameters=None, tie_word_embeddings=True),
    ),
    (
        "gpt_oss",
        dict(num_local_experts=3, num_experts_per_tok=1, layer_types=[LOCAL] * 2)
        | dict(intermediate_size=40, num_key_value_heads=4, max_position_embeddings=400),
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", range(len(LIVE)))
def test_live_comparison(case, tmp_path: Path):
    """Other sizes and seeds than the recorded ones, where torch and transformers are installed."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import make_fixtures

    (name, changes), seed = LIVE[case], 100 + case
    model = make_fixtures.random_model(name, seed, **changes)
    prompts = make_fixtures.random_prompts(seed, model.config.vocab_size, lens=(40, 1, 16, 27))
    prefill, tokens, decode = make_fixtures.expected(model, prompts)
    make_fixtures.save_checkpoint(model, tmp_path / name)
    found = teacher_forced(
        load(tmp_path / name, dtype=jnp.float32).model, prompts, tokens, page_size=4
    )
    assert_same_logits(found, (prefill, decode), tokens)
