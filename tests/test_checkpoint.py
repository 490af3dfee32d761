"""Reading Hugging Face directories: what is understood, and an error for everything else."""

import json
import re
import shutil
import sys
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from make_fixtures import FIXTURES
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from paxattn.models import CheckpointError, GenerationConfig, bundled, load
from paxattn.models.config import config_from_dict
from paxattn.models.fields import read_json
from paxattn.rope import Rope
from paxattn.sampling import SamplingParams

LLAMA = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    hidden_act="silu",
)
MISTRAL = LLAMA | dict(
    model_type="mistral", architectures=["MistralForCausalLM"], num_key_value_heads=2
)
QWEN2 = LLAMA | dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], num_key_value_heads=2)
QWEN3 = LLAMA | dict(
    model_type="qwen3", architectures=["Qwen3ForCausalLM"], num_key_value_heads=2, head_dim=16
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)


def fails(message):
    """A CheckpointError of one line that contains ``message``."""
    return pytest.raises(CheckpointError, match=r"\A[^\n]*" + re.escape(message) + r"[^\n]*\Z")


@pytest.fixture
def directory(tmp_path):
    """A checkpoint to damage: llama3_tied, in one file."""
    shutil.copytree(FIXTURES / "llama3_tied", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    shutil.copytree(FIXTURES / "llama3", tmp_path / "model")
    return tmp_path / "model"


def edit_json(path, **changes):
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors), directory / "model.safetensors")


# config.json


def test_llama2_config():
    config = config_from_dict(LLAMA)
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert config.rope == Rope(theta=10_000.0)
    assert (config.norm_eps, config.max_positions) == (1e-5, 512)
    assert not any((config.tie_embeddings, config.qkv_bias, config.qk_norm, config.windows))
    assert config.dtype is None
    assert hash(config) == hash(config_from_dict(dict(LLAMA)))


def test_old_and_new_spelling_of_rope_and_dtype():
    old = config_from_dict(
        LLAMA | dict(rope_theta=5e5, rope_scaling=LLAMA3_ROPE, torch_dtype="torch.bfloat16")
    )
    new = config_from_dict(
        LLAMA | dict(rope_parameters=LLAMA3_ROPE | dict(rope_theta=5e5), dtype="bfloat16")
    )
    assert old == new
    assert new.dtype == "bfloat16"
    assert new.rope == Rope(
        theta=5e5,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=128,
    )
    linear = config_from_dict(LLAMA | dict(rope_scaling=dict(type="linear", factor=2)))
    assert linear.rope == Rope(kind="linear", factor=2.0)
    del_length = {k: v for k, v in LLAMA3_ROPE.items() if not k.startswith("original")}
    for fields, length in (
        (dict(rope_scaling=del_length), 512),
        (dict(rope_scaling=del_length, original_max_position_embeddings=64), 64),
        (dict(rope_scaling=LLAMA3_ROPE, original_max_position_embeddings=64), 64),
    ):
        assert config_from_dict(LLAMA | fields).rope.original_max_positions == length


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        (MISTRAL, (4096, 4096)),  # transformers' default
        (MISTRAL | dict(sliding_window=None), ()),
        (MISTRAL | dict(sliding_window=7), (7, 7)),
        (LLAMA | dict(sliding_window=7), ()),  # which transformers ignores too
        (QWEN2 | dict(sliding_window=7), ()),
        (QWEN2 | dict(sliding_window=7, use_sliding_window=True, max_window_layers=1), (0, 7)),
        (QWEN2 | dict(sliding_window=7, use_sliding_window=True, max_window_layers=0), (7, 7)),
        (QWEN2 | dict(sliding_window=7, use_sliding_window=True, max_window_layers=2), ()),
        (
            QWEN3
            | dict(
                sliding_window=7,
                use_sliding_window=True,
                layer_types=["sliding_attention", "full_attention"],
            ),
            (7, 0),
        ),
        (QWEN3 | dict(layer_types=["full_attention"] * 2), ()),
    ],
)
def test_windows(fields, windows):
    assert config_from_dict(fields).windows == windows


def test_families():
    assert config_from_dict(QWEN2).qkv_bias
    qwen3 = config_from_dict(QWEN3)
    assert qwen3.qk_norm
    assert qwen3.head_dim == 16
    without = {k: v for k, v in QWEN3.items() if k != "head_dim"}
    assert config_from_dict(without).head_dim == 128
    assert config_from_dict(MISTRAL | dict(head_dim=None)).head_dim == 8
    biased = config_from_dict(LLAMA | dict(attention_bias=True))
    assert biased.qkv_bias
    assert biased.o_bias
    assert config_from_dict(LLAMA | dict(hidden_act="gelu_pytorch_tanh")).activation == "gelu_tanh"
    # What transformers ignores, because no such tensor exists.
    assert not config_from_dict(MISTRAL | dict(attention_bias=True)).qkv_bias
    assert config_from_dict(QWEN2 | dict(attention_bias=False)).qkv_bias


def test_kv_heads_that_are_not_given():
    """As in transformers: the family's default where the field is absent, all heads where null."""
    for fields, absent in ((MISTRAL, 8), (QWEN2, 32), (QWEN3, 32), (LLAMA, 64)):
        fields = {k: v for k, v in fields.items() if k != "num_key_value_heads"}
        fields["num_attention_heads"] = 64
        fields["hidden_size"] = 512
        assert config_from_dict(fields).num_kv_heads == absent
        assert config_from_dict(fields | dict(num_key_value_heads=None)).num_kv_heads == 64


def test_a_byte_order_mark_is_no_error(directory):
    path = directory / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_json(path)["model_type"] == "llama"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="gpt2"), "config.json: model_type='gpt2' is not supported; supported: l"),
        (dict(model_type=None), "model_type=None is not supported; supported: llama (LlamaFor"),
        (dict(model_type=["llama"]), "model_type=['llama'] is not supported"),
        (
            dict(architectures=["LlamaForSequenceClassification"]),
            "architectures=['LlamaForSequenceClassification'] is not supported; supported: llama",
        ),
        (dict(architectures=7), "architectures=7 is not supported; supported: llama"),
        (dict(hidden_size=None), "config.json: 'hidden_size' is missing"),
        (dict(hidden_size=2**31), "hidden_size=2147483648 must be a positive integer below 2**31"),
        (dict(hidden_size="32"), "hidden_size='32' must be a positive integer"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0 must be a positive integer"),
        (dict(num_hidden_layers=2**21), "num_hidden_layers=2097152 must be at most 1048576"),
        (dict(vocab_size=True), "vocab_size=True must be a positive integer"),
        (dict(rms_norm_eps=None), "'rms_norm_eps' is missing"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan must be a positive number"),
        (dict(rms_norm_eps="x"), "rms_norm_eps='x' must be a positive number"),
        (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported; supported: silu, swish"),
        (dict(attention_bias="yes"), "attention_bias='yes' must be true or false"),
        (dict(mlp_bias=True), "mlp_bias=True is not supported"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
        (
            dict(quantization_config=dict(quant_method="gptq")),
            "quantization_config={'quant_method': 'gptq'} is not supported",
        ),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings='yes' must be true or false"),
        (dict(num_attention_heads=5), "hidden_size=32 is no multiple of num_attention_heads=5"),
        (dict(num_key_value_heads=3), "num_heads=4 must be a multiple of num_kv_heads=3"),
        (dict(head_dim=7), "head_dim=7 must be even"),
        (dict(dtype="int8"), "dtype='int8' is not supported; supported: float32, bfloat16"),
        (dict(torch_dtype=8), "dtype=8 is not supported"),
        (
            dict(rope_scaling=dict(rope_type="longrope", factor=4.0)),
            "rope_scaling has rope_type='longrope', which is not supported; supported: default",
        ),
        (dict(rope_scaling=dict(type="dynamic")), "rope_type='dynamic', which is not supported"),
        (dict(rope_scaling="linear"), "rope_scaling='linear' must be an object"),
        (dict(rope_scaling=dict(type="linear")), "rope_scaling: 'factor' is missing"),
        (
            dict(rope_scaling=LLAMA3_ROPE | dict(high_freq_factor=1.0)),
            "low_freq_factor=1.0 must be positive and below high_freq_factor=1.0",
        ),
        (
            dict(rope_parameters=dict(rope_type="default", mrope_section=[1])),
            "rope_parameters has 'mrope_section', which is not supported",
        ),
        (
            dict(rope_parameters=dict(partial_rotary_factor=0.5)),
            "rope_parameters has partial_rotary_factor=0.5, which is not supported",
        ),
        (dict(rope_theta=-1), "rope_theta=-1 must be a positive number"),
        (
            MISTRAL | dict(layer_types=["full_attention", "sliding_attention"]),
            "layer_types=['full_attention', 'sliding_attention'] is not supported for mistral",
        ),
        (QWEN2 | dict(layer_types=["conv"] * 2), "layer_types=['conv', 'conv']: supported are"),
        (QWEN2 | dict(layer_types=3), "layer_types=3: supported are full_attention, sliding"),
        (
            QWEN2 | dict(layer_types=["full_attention"]),
            "len(layer_types)=1 must be num_hidden_layers=2",
        ),
        (
            QWEN2 | dict(layer_types=["sliding_attention"] * 2),
            "layer_types has sliding_attention, but there is no sliding_window in use",
        ),
        (MISTRAL | dict(sliding_window=-1), "sliding_window=-1 must be a positive integer"),
        (MISTRAL | dict(sliding_window=2**40), "sliding_window=1099511627776 must be a positive"),
        (QWEN2 | dict(use_mrope=True), "use_mrope=True is not supported, only False"),
    ],
)
def test_config_errors(changes, message):
    with fails(message):
        config_from_dict(LLAMA | changes)


# Tensors


def test_load_single_file(directory):
    checkpoint = load(directory)
    assert checkpoint.config == checkpoint.model.config
    assert checkpoint.model.embed.dtype == jnp.float16  # as config.json says
    assert checkpoint.model.head is None
    stored = load_file(directory / "model.safetensors")
    np.testing.assert_array_equal(
        checkpoint.model.kernels["down"][1], stored["model.layers.1.mlp.down_proj.weight"]
    )
    np.testing.assert_array_equal(
        checkpoint.model.vectors["mlp_norm"][2],
        stored["model.layers.2.post_attention_layernorm.weight"],
    )
    assert checkpoint.tokenizer is None
    assert checkpoint.generation_config == GenerationConfig()
    assert checkpoint.stop_token_ids == ()


def test_load_shards_stacked_with_progress(sharded):
    calls = []
    model = load(sharded, stacked=True, progress=lambda *call: calls.append(call)).model
    stored = {}
    for path in sharded.glob("*.safetensors"):
        stored |= load_file(path)
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        np.testing.assert_array_equal(model.kernels["o"][layer], stored[name])
    np.testing.assert_array_equal(model.head, stored["lm_head.weight"])
    total = sum(array.nbytes for array in stored.values())
    assert len(calls) == 2 + 1 + 3 * 6
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize(
    ("stored", "named"), [("float64", None), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, "float16"])
def test_dtypes(directory, stored, named, dtype):
    edit_json(directory / "config.json", dtype=named if named else ...)
    originals = load_file(directory / "model.safetensors")
    edit_tensors(
        directory, lambda tensors: {k: v.astype(jnp.dtype(stored)) for k, v in tensors.items()}
    )
    embed = load(directory, dtype=dtype).model.embed[...]
    expected = jnp.dtype(dtype) if dtype else jnp.dtype(named or "float32")
    assert embed.dtype == expected
    original = originals["model.embed_tokens.weight"].astype(jnp.dtype(stored))
    np.testing.assert_array_equal(embed, original.astype(expected))


@pytest.mark.parametrize("dtype", ["int8", "float64", "banana"])
def test_unsuitable_dtype(directory, dtype):
    with pytest.raises(ValueError, match=f"dtype='?{dtype}'? must be float32, bfloat16 or float16"):
        load(directory, dtype=dtype)


def test_harmless_extra_tensors(directory):
    def change(tensors):
        extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8) for i in range(3)}
        return tensors | extra | {"lm_head.weight": tensors["model.embed_tokens.weight"]}

    edit_tensors(directory, change)
    assert load(directory).model.head is None


def rename(old, new):
    return lambda tensors: {new if name == old else name: t for name, t in tensors.items()}


def replace_tensor(name, array):
    return lambda tensors: tensors | {name: array}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            rename("model.norm.weight", "model.norm.scale"),
            "1 tensor (model.norm.weight) missing from the checkpoint; fetch it again",
        ),
        (
            lambda tensors: {k: v for k, v in tensors.items() if "layers.1." not in k},
            "9 tensors (model.layers.1.self_attn.q_proj.weight, model.layers.1.self_attn.k_proj.",
        ),
        (
            lambda tensors: {k: v for k, v in tensors.items() if "layers.1." not in k},
            "and 6 more) missing from the checkpoint",
        ),
        (
            lambda tensors: tensors | {"model.layers.0.self_attn.q_norm.weight": np.ones(16)},
            "1 tensor (model.layers.0.self_attn.q_norm.weight) not known to a model of this kind",
        ),
        (
            replace_tensor("model.layers.2.mlp.up_proj.weight", np.ones((32, 48), np.float16)),
            "model.safetensors: tensor model.layers.2.mlp.up_proj.weight has shape (32, 48), but "
            "config.json asks for (48, 32)",
        ),
        (
            replace_tensor("model.norm.weight", np.ones(32, np.int8)),
            "tensor model.norm.weight is I8; supported are F64, F32, BF16, F16 (quantized",
        ),
        (
            replace_tensor("model.norm.weight", np.ones(32, ml_dtypes.float8_e4m3fn)),
            "tensor model.norm.weight is F8_E4M3; supported are",
        ),
        (
            replace_tensor("lm_head.weight", np.ones((64, 32), np.float16)),
            "config.json says tie_word_embeddings, but lm_head.weight differs from",
        ),
        (
            replace_tensor("model.norm.weight", np.full(32, 1e6, np.float32)),
            "tensor model.norm.weight has values beyond float16's range; load it in bfloat16",
        ),
    ],
)
def test_tensor_errors(directory, change, message):
    edit_tensors(directory, change)
    with fails(message):
        load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "damaged or truncated"),
        (lambda data: data[:100], "damaged or truncated"),
        (lambda data: b"", "damaged or truncated"),
        (lambda data: b"\xff" * len(data), "damaged or truncated"),
        (lambda data: data + b"\0", "damaged or truncated"),
    ],
)
def test_damaged_tensor_files(directory, change, message):
    path = directory / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with fails(f"{path}: {message}"):
        load(directory)


def test_more_layers_than_tensors(directory):
    """Said at once: the names of so many layers would fill memory."""
    edit_json(directory / "config.json", num_hidden_layers=10**6)
    with fails("has 29 tensors, but config.json says num_hidden_layers=1000000; check config"):
        load(directory)


def test_no_tensor_files(directory):
    (directory / "model.safetensors").unlink()
    with fails("has neither model.safetensors nor model.safetensors.index.json; weights in other"):
        load(directory)


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with fails("model-00002-of-00002.safetensors: no such file, though model.safetensors.index"):
        load(sharded)


def test_index_and_shards_disagree(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    swapped = {name: first if shard == second else second for name, shard in weight_map.items()}
    edit_json(index, weight_map=swapped)
    with fails("though model.safetensors.index.json says so; fetch the checkpoint again"):
        load(sharded)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b", "a\0b", 7, None]
)
def test_shard_outside_of_the_directory(sharded, shard):
    (sharded.parent / "secret.safetensors").write_bytes(b"")
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.norm.weight": shard})
    with fails(f"tensor model.norm.weight is said to be in {shard!r}, which is not the name of"):
        load(sharded)


@pytest.mark.parametrize("weight_map", [..., {}, ["model.norm.weight"]])
def test_index_without_tensors(sharded, weight_map):
    edit_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    with fails("model.safetensors.index.json: has no 'weight_map' object with tensors in it"):
        load(sharded)


def test_shards_may_be_links(sharded, tmp_path):
    """As in the hub's own cache."""
    (tmp_path / "blobs").mkdir()
    for path in list(sharded.glob("*.safetensors")):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    load(sharded)


# JSON files, tokenizer, generation config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json: not valid JSON: Expecting property name"),
        (b"", "config.json: not valid JSON: Expecting value"),
        (b"[" * 100_000, "config.json: not valid JSON: "),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "config.json: not valid JSON: Exceeds the limit"),
        (b"[]", "config.json: must hold a JSON object, not list"),
        (b"\xff\xfe{}", "config.json: cannot be read: 'utf-8' codec can't decode"),
        (b"{}", "config.json: model_type=None is not supported"),
    ],
)
def test_damaged_config(directory, content, message):
    (directory / "config.json").write_bytes(content)
    with fails(message):
        load(directory)


def test_no_config(directory):
    (directory / "config.json").unlink()
    with fails("config.json: no such file; a Hugging Face checkpoint directory has a config.json"):
        load(directory)


def test_tokenizer(directory):
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.save(str(directory / "tokenizer.json"))
    assert load(directory).tokenizer.encode("b").ids == [1]
    # Left in the file by training; transformers ignores it too.
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(directory / "tokenizer.json"))
    assert load(directory).tokenizer.encode("b a b").ids == [1, 0, 1]
    assert load(directory).tokenizer.encode("b").ids == [1]
    vocab_size = load(directory).config.vocab_size
    tokenizer.add_tokens([f"t{i}" for i in range(2, vocab_size + 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    assert load(directory).tokenizer.encode(f"t{vocab_size}").ids == [vocab_size]
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(vocab_size + 1)}, unk_token="t0"))
    tokenizer.save(str(directory / "tokenizer.json"))
    with fails(
        f"tokenizer.json: has token ids up to {vocab_size} ('t{vocab_size}'), but config.json says "
        f"vocab_size={vocab_size}; use the tokenizer that this model was trained with"
    ):
        load(directory)
    (directory / "tokenizer.json").write_text('{"model": 3}')
    with fails("tokenizer.json: not a tokenizer ("):
        load(directory)


def test_generation_config(directory):
    edit_json(
        directory / "generation_config.json",
        eos_token_id=[5, 7, 151645],  # the last is beyond the vocabulary
        bos_token_id=1,
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.9,
    )
    checkpoint = load(directory)
    assert checkpoint.stop_token_ids == (5, 7)
    assert checkpoint.generation_config == GenerationConfig(
        eos_ids=(5, 7, 151645), do_sample=True, temperature=0.6, top_k=20, top_p=0.9
    )
    sampling = SamplingParams(seed=3, **checkpoint.generation_config.sampling)
    assert sampling == SamplingParams(temperature=0.6, top_k=20, top_p=0.9, seed=3)
    assert GenerationConfig(temperature=0.6).sampling == {}  # not sampled: greedy


def test_token_ids_from_config_json(directory):
    (directory / "generation_config.json").unlink()
    edit_json(directory / "config.json", eos_token_id=9)
    assert load(directory).generation_config == GenerationConfig(eos_ids=(9,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(eos_token_id="</s>"),
            "generation_config.json: eos_token_id='</s>' must be token ids",
        ),
        (dict(eos_token_id=[1, -1]), "eos_token_id=[1, -1] must be token ids"),
        (dict(temperature="hot"), "generation_config.json: temperature='hot' must be a number"),
        (dict(eos_token_id=2**31), "eos_token_id=2147483648 must be token ids"),
        (dict(temperature=float("nan")), "temperature=nan must be a number"),
        (dict(top_k=0.5), "top_k=0.5 must be a number"),
    ],
)
def test_generation_config_errors(directory, changes, message):
    edit_json(directory / "generation_config.json", **changes)
    with fails(message):
        load(directory)


# Where it comes from


def test_no_such_directory(tmp_path):
    with pytest.raises(TypeError, match="path=3 must be a directory or a hub id"):
        load(3)
    with fails("nowhere: no such directory"):
        load(tmp_path / "nowhere")
    with fails("./models/none: no such directory"):
        load("./models/none")
    with fails("~nobody-of-this-name/x: no such directory (Could not determine home directory.)"):
        load("~nobody-of-this-name/x")
    with fails("x/y: no such directory (File name too long)"):
        load("x" * 300 + "/y")
    with fails("config.json: is a file; pass the directory that holds config.json"):
        load(FIXTURES / "llama2" / "config.json")


def test_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed
    with fails(
        "org/name: no such directory; to fetch it from the Hugging Face hub install "
        "huggingface_hub (pip install 'paxattn[hub]'), or pass a local directory"
    ):
        load("org/name")
    hub = types.ModuleType("huggingface_hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)

    def offline(repo_id, allow_patterns):
        raise ConnectionError("cannot reach the hub\nmore\nlines")

    monkeypatch.setattr(hub, "snapshot_download", offline, raising=False)
    with fails(
        "org/name: no such directory, and it could not be fetched from the Hugging Face hub "
        "(ConnectionError: cannot reach the hub); pass a local directory"
    ):
        load("org/name")

    def fetch(repo_id, allow_patterns):
        assert repo_id == "org/name"
        assert "config.json" in allow_patterns
        return str(FIXTURES / "llama3_tied")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert load("org/name").config.tie_embeddings


def test_bundled_is_in_the_package():
    assert bundled().parent.parent.name == "paxattn"


def test_a_sliding_window_that_is_not_said():
    """As in transformers: 4,096 tokens where it is in use, and none of these fields where not."""
    for fields in (QWEN2, QWEN3):
        used = dict(use_sliding_window=True, max_window_layers=1)
        assert config_from_dict(fields | used).windows == (0, 4096)
        assert config_from_dict(fields | used | dict(sliding_window=None)).windows == ()
        unused = dict(use_sliding_window=False, max_window_layers=-1, sliding_window=0)
        assert config_from_dict(fields | unused).windows == ()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (np.ones((64, 32), ml_dtypes.float8_e4m3fn), "tensor lm_head.weight is F8_E4M3; supported"),
        (np.ones((65, 32), np.float16), "lm_head.weight has shape (65, 32), but config.json asks"),
    ],
)
def test_an_unsuitable_head_beside_a_tied_embedding(directory, head, message):
    edit_tensors(directory, replace_tensor("lm_head.weight", head))
    with fails(message):
        load(directory)
