"""Gemma 2, Gemma 3 and gpt-oss: their config.json, their tensors, experts, and every loop."""

import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from make_beams import CASES, NEW_TOKENS, STOP_IDS
from make_fixtures import FIXTURES
from safetensors.numpy import load_file, save_file
from test_decoder import SMALL, numpy_decoder, recorded

from paxattn import generate
from paxattn.models import CheckpointError, Experts, load
from paxattn.models.config import config_from_dict
from paxattn.models.experts import mix_experts
from paxattn.models.mxfp4 import dequantize
from paxattn.rope import Rope
from paxattn.serving import Engine
from paxattn.step import window_of

GEMMA2 = dict(  # of 2B, as released, without what says nothing about the mathematics
    model_type="gemma2",
    architectures=["Gemma2ForCausalLM"],
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=2304,
    intermediate_size=9216,
    max_position_embeddings=8192,
    num_attention_heads=8,
    num_hidden_layers=4,
    num_key_value_heads=4,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    sliding_window=4096,
    torch_dtype="float32",
    vocab_size=256000,
)
GEMMA3 = dict(  # of 1B
    model_type="gemma3_text",
    architectures=["Gemma3ForCausalLM"],
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=1152,
    intermediate_size=6912,
    max_position_embeddings=32768,
    num_attention_heads=4,
    num_hidden_layers=8,
    num_key_value_heads=1,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
    torch_dtype="bfloat16",
    vocab_size=262144,
)
GEMMA3_4B = dict(
    model_type="gemma3",
    architectures=["Gemma3ForConditionalGeneration"],
    eos_token_id=[1, 106],
    image_token_index=262144,
    text_config=dict(
        model_type="gemma3_text",
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=7,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window=1024,
    ),
    torch_dtype="bfloat16",
    vision_config=dict(hidden_size=1152, model_type="siglip_vision_model"),
)
YARN = dict(
    rope_type="yarn",
    factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=4096,
)
GPT_OSS = dict(
    model_type="gpt_oss",
    architectures=["GptOssForCausalLM"],
    attention_bias=True,
    eos_token_id=200002,
    experts_per_token=4,
    head_dim=64,
    hidden_act="silu",
    hidden_size=2880,
    initial_context_length=4096,
    intermediate_size=2880,
    layer_types=["sliding_attention", "full_attention"] * 2,
    max_position_embeddings=131072,
    num_attention_heads=64,
    num_experts_per_tok=4,
    num_hidden_layers=4,
    num_key_value_heads=8,
    num_local_experts=32,
    quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"]),
    rms_norm_eps=1e-5,
    rope_scaling=YARN,
    rope_theta=150000,
    sliding_window=128,
    swiglu_limit=7.0,
    tie_word_embeddings=False,
    vocab_size=201088,
)


def without(fields, *keys):
    return {key: value for key, value in fields.items() if key not in keys}


# config.json


def test_gemma2_config():
    config = config_from_dict(GEMMA2)
    assert (config.soft_cap, config.final_soft_cap, config.sm_scale) == (50.0, 30.0, 1 / 16)
    assert config.windows == (4096, 0, 4096, 0)
    assert window_of(numpy_decoder(replace(SMALL, windows=(7, 0, 7)))) is None
    assert config.scale_embeddings
    assert config.out_norms
    assert config.tie_embeddings  # transformers' default for the family
    assert config.activation == "gelu_tanh"
    assert not any((config.qk_norm, config.qkv_bias, config.o_bias, config.sinks, config.experts))
    assert config_from_dict(GEMMA2 | dict(attn_logit_softcapping=None)).soft_cap is None
    assert config_from_dict(without(GEMMA2, "attn_logit_softcapping", "head_dim")) == config
    full = ["full_attention"] * 3 + ["sliding_attention"]
    assert config_from_dict(GEMMA2 | dict(layer_types=full)).windows == (0, 0, 0, 4096)
    biased = config_from_dict(GEMMA2 | dict(attention_bias=True))
    assert biased.qkv_bias
    assert biased.o_bias


def test_gemma3_config():
    config = config_from_dict(GEMMA3)
    assert config.windows == (512,) * 5 + (0,) + (512,) * 2
    assert (config.rope, config.local_rope) == (Rope(theta=1e6), Rope(theta=1e4))
    assert config.qk_norm
    assert config.soft_cap is config.final_soft_cap is None
    assert config_from_dict(without(GEMMA3, "rope_theta", "rope_local_base_freq")) == config
    assert config_from_dict(GEMMA3 | dict(sliding_window_pattern=3)).windows[:3] == (512, 512, 0)
    new = without(GEMMA3, "rope_theta", "rope_local_base_freq", "rope_scaling") | dict(
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
        ),
    )
    old = GEMMA3 | dict(rope_scaling=dict(type="linear", factor=8.0))
    assert config_from_dict(new) == config_from_dict(old)
    assert config_from_dict(new).rope == Rope(theta=1e6, kind="linear", factor=8.0)


def test_gemma3_config_with_vision():
    config = config_from_dict(GEMMA3_4B)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_positions) == (262_208, 131_072)
    assert config.rope == Rope(theta=1e6, kind="linear", factor=8.0)
    assert config.windows == (1024,) * 5 + (0, 1024)
    assert config.tie_embeddings
    assert config.dtype == "bfloat16"


def test_gpt_oss_config():
    config = config_from_dict(GPT_OSS)
    assert config.experts == Experts(num_experts=32, per_token=4, alpha=1.702, limit=7.0)
    assert config.windows == (128, 0, 128, 0)
    assert all((config.sinks, config.qkv_bias, config.o_bias))
    assert config.rope == Rope(
        theta=150_000.0,
        kind="yarn",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=32.0,
        original_max_positions=4096,
        truncate=False,
    )
    assert config.dtype is None
    assert config_from_dict(without(GPT_OSS, "layer_types", "rope_scaling")) == config
    new = without(GPT_OSS, "rope_scaling", "rope_theta")
    assert config_from_dict(new | dict(rope_parameters=YARN | dict(rope_theta=150000))) == config


def test_yarn_of_other_families():
    scaling = dict(type="yarn", factor=4.0, original_max_position_embeddings=32)
    qwen = dict(
        model_type="qwen2",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
    )
    rope = config_from_dict(qwen | dict(rope_scaling=scaling)).rope
    assert rope == Rope(kind="yarn", factor=4.0, original_max_positions=32, high_freq_factor=32.0)
    # From transformers, for heads of 16 elements and a base of 10,000.
    expected = [1.0, 0.19764235615730286, 0.02500000037252903, 0.007905694656074047]
    np.testing.assert_allclose(rope.frequencies(16)[:4], expected, rtol=1e-6)
    cos, sin = rope.angles(jnp.zeros(1, jnp.int32), 16)
    np.testing.assert_allclose(cos, 1.138629436111989, rtol=1e-6)
    assert not sin.any()
    both = scaling | dict(mscale=1.0, mscale_all_dim=0.5)
    factor = config_from_dict(qwen | dict(rope_scaling=both)).rope.attention_factor
    np.testing.assert_allclose(factor, 1.0648216253695715)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (GEMMA2 | dict(use_bidirectional_attention=True), "use_bidirectional_attention=True is"),
        (GEMMA2 | dict(hidden_activation="relu"), "hidden_activation='relu' is not supported"),
        (GEMMA2 | dict(query_pre_attn_scalar=0), "query_pre_attn_scalar=0 must be a positive"),
        (GEMMA2 | dict(attn_logit_softcapping=-1), "attn_logit_softcapping=-1 must be a positive"),
        (GEMMA2 | dict(sliding_window=None), "there is no sliding_window in use"),
        (
            GEMMA2 | dict(quantization_config=dict(quant_method="mxfp4")),
            "quantization_config={'quant_method': 'mxfp4'} is not supported, only None",
        ),
        (
            GEMMA3 | dict(rope_parameters=dict(rope_theta=1e6)),
            "rope_parameters has 'rope_theta', which is not supported; it has full_attention",
        ),
        (
            GEMMA3 | dict(rope_parameters=dict(full_attention=dict(rope_type="longrope"))),
            "rope_parameters has rope_type='longrope', which is not supported",
        ),
        (GEMMA3 | dict(sliding_window_pattern=0), "sliding_window_pattern=0 must be a positive"),
        (GEMMA3_4B | dict(text_config=[1]), "config.json: text_config=[1] must be an object"),
        (
            GEMMA3_4B | dict(text_config=dict(hidden_size=-1)),
            "config.json: text_config: hidden_size=-1 must be a positive integer",
        ),
        (GEMMA3_4B | dict(quantization_config=dict(bits=4)), "{'bits': 4} is not supported"),
        (GPT_OSS | dict(num_experts_per_tok=33), "per_token=33 must be between 1 and num_exp"),
        (GPT_OSS | dict(swiglu_limit=None), "'swiglu_limit' is missing"),
        (
            GPT_OSS | dict(quantization_config=dict(quant_method="awq")),
            "quantization_config={'quant_method': 'awq'} is not supported",
        ),
        (
            GPT_OSS | dict(rope_scaling=YARN | dict(truncate="no")),
            "rope_scaling: truncate='no' must be true or false",
        ),
        (
            GPT_OSS | dict(rope_scaling=YARN | dict(beta_fast=0.5)),
            "low_freq_factor=1.0 must be positive and below high_freq_factor=0.5",
        ),
        (GPT_OSS | dict(rope_theta=1.0), "theta=1.0 must be above 1 for kind='yarn'"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        config_from_dict(fields)


# Tensors


@pytest.mark.parametrize(
    ("model", "head"),
    [("language_model.model.", "language_model."), ("model.language_model.", "")],
)
def test_the_text_part_of_a_larger_checkpoint(tmp_path, model, head):
    plain = load(FIXTURES / "gemma3").model
    shutil.copytree(FIXTURES / "gemma3", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    renamed = {
        re.sub("^lm_head", f"{head}lm_head", re.sub(r"^model\.", model, name)): array
        for name, array in tensors.items()
    }
    vision = {"vision_tower.x.weight": np.ones(3, np.int8), "multi_modal_projector.y": np.ones(2)}
    save_file(renamed | vision, tmp_path / "model" / "model.safetensors")
    path = tmp_path / "model" / "config.json"
    text = json.loads(path.read_text()) | dict(eos_token_id=[1, 60])
    whole = dict(model_type="gemma3", text_config=text, vision_config={}, tie_word_embeddings=False)
    path.write_text(json.dumps(whole))
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    checkpoint = load(tmp_path / "model")
    assert checkpoint.stop_token_ids == (1, 60)
    found = checkpoint.model
    assert jax.tree.structure(found.kernels) == jax.tree.structure(plain.kernels)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)
    save_file(renamed | {"audio_tower.x": np.ones(2)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor \(audio_tower.x\) not known to a model"):
        load(tmp_path / "model")


def test_gemma_in_bfloat16():
    """Norms are one more than stored, which bfloat16 would round."""
    stored = load_file(FIXTURES / "gemma2" / "model.safetensors")
    model = load(FIXTURES / "gemma2", dtype="bfloat16").model
    assert model.embed.dtype == model.kernels["down"][0].dtype == jnp.bfloat16
    of_layer = stored["model.layers.1.pre_feedforward_layernorm.weight"].astype(ml_dtypes.bfloat16)
    expected = 1 + of_layer.astype(np.float32)
    np.testing.assert_array_equal(model.vectors["mlp_norm"][1], expected)
    assert model.norm.dtype == jnp.float32


def test_mxfp4():
    """Against the format's own words, number by number."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 2, 16), np.uint8)
    scales = rng.integers(100, 140, (3, 2), np.uint8)
    found = dequantize(blocks, scales)
    assert found.shape == (3, 64)
    for row, group, i in np.ndindex(3, 2, 32):
        code = int(blocks[row, group, i // 2]) >> (4 * (i % 2)) & 15
        exponent, mantissa = code >> 1 & 3, code & 1
        value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        value *= (-1) ** (code >> 3) * 2.0 ** (int(scales[row, group]) - 127)
        assert found[row, 32 * group + i] == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, x: None if name.endswith("_scales") else x, "4 tensors (model.layers.0.mlp"),
        (
            lambda name, x: x.astype(np.float16) if name.endswith("_blocks") else x,
            "gate_up_proj_blocks is F16; supported are U8",
        ),
        (
            lambda name, x: x[..., :8] if name.endswith("down_proj_blocks") else x,
            "has shape (4, 32, 2, 8), but config.json asks for (4, 32, 2, 16)",
        ),
    ],
)
def test_damaged_mxfp4(tmp_path, change, message):
    shutil.copytree(FIXTURES / "gpt_oss_mxfp4", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    changed = {name: change(name, array) for name, array in load_file(path).items()}
    save_file({name: x for name, x in changed.items() if x is not None}, path)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(tmp_path / "model")


# Experts


def one_at_a_time(x, logits, gate_up, gate_up_bias, down, down_bias, experts):
    """Each token through each of its experts, in float64."""
    out = np.zeros(x.shape)
    for t, row in enumerate(x.astype(np.float64)):
        chosen = np.argsort(-logits[t])[: experts.per_token]
        shares = np.exp(logits[t][chosen] - logits[t].max())
        for e, share in zip(chosen, shares / shares.sum(), strict=True):
            gate, up = np.moveaxis(gate_up[e] @ row + gate_up_bias[e], -1, 0)
            gate, up = np.minimum(gate, experts.limit), np.clip(up, -experts.limit, experts.limit)
            inner = (up + 1) * gate / (1 + np.exp(-experts.alpha * gate))
            out[t] += share * (down[e] @ inner + down_bias[e])
    return out


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "per_token", "padding"),
    [(1, 4, 2, 0), (40, 3, 1, 5), (70, 4, 4, 1), (6, 32, 3, 6)],
)
def test_experts(num_tokens, num_experts, per_token, padding):
    """Tiles that end within an expert, experts without tokens, padding (NaN where it may be)."""
    rng = np.random.default_rng(num_tokens)
    experts = Experts(num_experts=num_experts, per_token=per_token, alpha=1.5, limit=0.8)
    x = rng.normal(size=(num_tokens, 8)).astype(np.float32)
    logits = rng.normal(size=(num_tokens, num_experts)).astype(np.float32)
    logits[:, 0] += 2  # a crowd
    live = np.arange(num_tokens) < num_tokens - padding
    shapes = ((num_experts, 6, 2, 8), (num_experts, 6, 2), (num_experts, 8, 6), (num_experts, 8))
    parts = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    gate_up, gate_up_bias, down, down_bias = parts
    matrices = dict(
        expert_gate_up=np.stack([gate_up * np.nan, gate_up]),
        expert_down=np.stack([down * np.nan, down]),
    )
    vectors = dict(expert_gate_up_bias=gate_up_bias, expert_down_bias=down_bias)
    arguments = jax.tree.map(jnp.asarray, (x, logits, live, matrices, vectors, np.int32(1)))
    found = jax.jit(mix_experts, static_argnums=6)(*arguments, experts)
    expected = one_at_a_time(x, logits, *parts, experts)
    np.testing.assert_allclose(found[live], expected[live], atol=1e-5)
    assert not found[~live].any()


# Loops


@pytest.fixture
def loaded(request):
    """A fixture's model, prompts and greedy tokens; what the test compiles, LLVM leaves as it is.

    (Its optimisations take most of the time, and what is compared is mathematics.)
    """
    jax.config.update("jax_disable_most_optimizations", True)
    prompts, tokens, *_ = recorded(request.param)
    model = load(FIXTURES / request.param, dtype="float32").model
    yield model, [prompt.tolist() for prompt in prompts], tokens[:, :20].tolist()
    jax.config.update("jax_disable_most_optimizations", False)


def through(default=None):
    """Every family; all but the default under ``slow``."""
    names = [
        name if name == default else pytest.param(name, marks=pytest.mark.slow)
        for name in ("gemma2", "gemma3", "gpt_oss")
    ]
    return pytest.mark.parametrize("loaded", names, indirect=True)


def tokens_of(completions):
    return [completion.tokens for completion in completions]


@through("gpt_oss")
def test_generate(loaded):
    model, prompts, tokens = loaded
    out = generate(model, prompts, page_size=8, max_new_tokens=20)
    assert tokens_of(out.completions) == tokens


@through()
def test_engine(loaded):
    """Prompts in chunks of 8 beside decoding, all of it padded."""
    model, prompts, tokens = loaded
    sizes = dict(num_pages=24, page_size=8, max_seqs=2, max_requests=4, max_tokens=64)
    engine = Engine(model, **sizes, step_tokens=8)
    assert tokens_of(engine.generate(prompts, max_new_tokens=20)) == tokens


@through()
def test_two_beams(loaded):
    """Like transformers; more of them by the tests of beam search."""
    model, prompts, _ = loaded
    known = np.load(FIXTURES / model.config.family.removesuffix("_text") / "beams.npz")
    assert CASES[0] == (2, False, 1.0)
    out = generate(
        model,
        prompts,
        num_beams=2,
        num_return_sequences=2,
        page_size=8,
        max_new_tokens=NEW_TOKENS,
        stop_token_ids=STOP_IDS,
    )
    for i, completion in enumerate(out.completions):
        prompt, beam = divmod(i, 2)
        expected = known["tokens"][prompt, beam][: known["lens"][prompt, beam]]
        assert completion.tokens == expected.tolist()


def test_padding_between_tokens_gives_zeros():
    """Also where a tile is larger than all rows together, and computes more than was asked."""
    rng = np.random.default_rng(0)
    experts = Experts(num_experts=2, per_token=2)
    shapes = ((1, 2, 6, 2, 8), (1, 2, 8, 6), (2, 6, 2), (2, 8), (3, 8), (3, 2))
    gate_up, down, gate_up_bias, down_bias, x, logits = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes
    )
    out = mix_experts(
        x,
        logits,
        jnp.array([True, False, True]),
        dict(expert_gate_up=gate_up, expert_down=down),
        dict(expert_gate_up_bias=gate_up_bias, expert_down_bias=down_bias),
        jnp.int32(0),
        experts,
    )
    assert np.asarray(out).any(axis=1).tolist() == [True, False, True]
