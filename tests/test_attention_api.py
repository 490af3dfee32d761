"""What `paged_attention` refuses, in which words, and which implementation it picks."""

import functools
import re
import subprocess
import sys
import warnings

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    PartitionSpec,
    use_abstract_mesh,
)

import paxattn.attention as attention
from paxattn.attention import (
    attention_schedule,
    choice,
    explain,
    implementations,
    measure,
    paged_attention,
    tune,
    tuning,
)
from paxattn.attention import paged_attention_decode as decode

S = jax.ShapeDtypeStruct
T, R, M, N, P, D, HQ, HKV, L = 5, 2, 3, 6, 4, 8, 4, 2, 2


def arguments(**changes):
    """A valid call, as shapes only, with some arguments replaced (positional ones too)."""
    pages = S((N, HKV, P, D), jnp.float32)
    return (
        dict(
            q=S((T, HQ, D), jnp.float32),
            k_pages=pages,
            v_pages=pages,
            block_tables=S((R, M), jnp.int32),
            kv_lens=S((R,), jnp.int32),
            cu_q_lens=S((R + 1,), jnp.int32),
        )
        | changes
    )


STACKED = S((L, N, HKV, P, D), jnp.float32)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(q=[1.0]), TypeError, "q must be an array, not list"),
        (dict(q=S((T, D), jnp.float32)), ValueError, r"q.shape=\(5, 8\) must be \[tokens, num_q"),
        (dict(q=S((0, HQ, D), jnp.float32)), ValueError, "none of them 0"),
        (dict(q=S((T, HQ, D), jnp.int32)), TypeError, "q.dtype=.*int32.* must be one of float32"),
        (dict(k_pages=None), TypeError, "k_pages must be an array, not NoneType"),
        (dict(v_pages=3), TypeError, "v_pages must be an array, not int"),
        (
            dict(k_pages=S((N, P, D), jnp.float32)),
            ValueError,
            r"k_pages.shape=\(6, 4, 8\) must be \[num_pages, num_kv_heads, page_size, head_dim\]",
        ),
        (
            dict(v_pages=S((N, HKV, P, D + 1), jnp.float32)),
            ValueError,
            r"v_pages.shape=\(6, 2, 4, 9\) must equal k_pages.shape=\(6, 2, 4, 8\)",
        ),
        (dict(layer=0), ValueError, "layer=0 was given with pages of one layer.*drop layer="),
        (
            dict(k_pages=STACKED, v_pages=STACKED),
            ValueError,
            "holds the pages of 2 layers: say which with layer=",
        ),
        (
            dict(k_pages=STACKED, v_pages=STACKED, layer=2),
            ValueError,
            r"layer=2 must be in \[0, 2\)",
        ),
        (dict(k_pages=STACKED, v_pages=STACKED, layer=-1), ValueError, "layer=-1 must be in"),
        (dict(k_pages=STACKED, v_pages=STACKED, layer=0.0), TypeError, "layer=0.0 must be an int"),
        (
            dict(k_pages=STACKED, v_pages=STACKED, layer=S((1,), jnp.int32)),
            TypeError,
            r"layer must be an int or an i32\[\] array, got int32\[1\]",
        ),
        (
            dict(k_pages=S((N, HKV, P, D), jnp.bfloat16)),
            TypeError,
            "k_pages has dtype bfloat16, q has float32: cast q",
        ),
        (dict(q=S((T, HQ, 16), jnp.float32)), ValueError, "head_dim of q.shape=.* must be equal"),
        (
            dict(q=S((T, 3, D), jnp.float32)),
            ValueError,
            "num_q_heads=3 must be a multiple of num_kv_heads=2",
        ),
        (
            dict(block_tables=S((R, M), jnp.int16)),
            TypeError,
            r"block_tables has dtype int16, must be int32: block_tables.astype\(jnp.int32\)",
        ),
        (dict(kv_lens=np.zeros(R)), TypeError, "kv_lens has dtype float64, must be int32"),
        (dict(cu_q_lens=[0, 1, 2]), TypeError, "cu_q_lens must be an array, not list"),
        (
            dict(block_tables=S((R,), jnp.int32)),
            ValueError,
            r"block_tables.shape=\(2,\) must be \[rows, max_pages_per_seq\]",
        ),
        (
            dict(kv_lens=S((R + 1,), jnp.int32)),
            ValueError,
            r"kv_lens.shape=\(3,\) must be \(2,\): one length per row",
        ),
        (
            dict(cu_q_lens=S((R,), jnp.int32)),
            ValueError,
            r"cu_q_lens.shape=\(2,\) must be \(3,\): a running sum",
        ),
        (dict(max_q_len=0), ValueError, "max_q_len=0 must be at least 1"),
        (dict(max_q_len=S((), jnp.int32)), TypeError, "max_q_len must be a Python int"),
        (dict(max_q_len=1.5), TypeError, "max_q_len must be a Python int, not float"),
        (dict(max_q_len=True), TypeError, "max_q_len must be a Python int, not bool"),
        (dict(sm_scale=0.0), ValueError, "sm_scale=0.0 must be positive and finite"),
        (dict(sm_scale=np.float32(-1)), ValueError, "sm_scale=.*-1.* must be positive and finite"),
        (dict(sm_scale="x"), TypeError, "sm_scale must be a number, not str"),
        (dict(causal=None), TypeError, "causal must be a Python bool, not NoneType"),
        (dict(sliding_window=0), ValueError, "sliding_window=0 must be at least 1 token"),
        (dict(sliding_window=2**31), ValueError, "sliding_window=2147483648 must be .* an int32"),
        (dict(sliding_window=2.0), TypeError, "sliding_window=2.0 must be an int or an i32"),
        (
            dict(sliding_window=S((3,), jnp.int32)),
            TypeError,
            r"sliding_window must be an int or an i32\[\] array, got int32\[3\]",
        ),
        (
            dict(sliding_window=4, causal=False),
            ValueError,
            "sliding_window=4 needs causal=True",
        ),
        (dict(soft_cap=0.0), ValueError, "soft_cap=0.0 must be positive and finite"),
        (dict(soft_cap=float("nan")), ValueError, "soft_cap=nan must be positive and finite"),
        (dict(soft_cap=S((), jnp.float32)), TypeError, "soft_cap must be a Python float"),
        (
            dict(sinks=S((HQ + 1,), jnp.float32)),
            ValueError,
            r"sinks.shape=\(5,\) must be \(4,\): one logit per query head",
        ),
        (dict(sinks=S((HQ,), jnp.int32)), TypeError, "sinks.dtype=.* must be a float dtype"),
        (
            dict(implementation="triton"),
            ValueError,
            "unknown implementation 'triton': choose from mosaic_gpu, mosaic_tpu, reference",
        ),
        (dict(implementation=[]), ValueError, r"implementation=\[\] names nothing"),
        (dict(fixed_split=65), ValueError, "fixed_split=65 must be a positive multiple of 64"),
        (dict(fixed_split=64.0), TypeError, "fixed_split must be a Python int, not float"),
    ],
)
def test_refusals(changes, error, words):
    with pytest.raises(error, match=words):
        paged_attention(**arguments(**changes))
    with pytest.raises(error, match=words):
        explain(**arguments(**changes))


def test_a_schedule_is_for_such_calls_only():
    given = on_hopper(max_q_len=5, tokens=8, sliding_window=S((), jnp.int32))

    def attend(given, schedule_for, **options):
        static = {"max_q_len": given.pop("max_q_len")}
        schedule_for = static | dict(implementation="mosaic_gpu") | schedule_for

        def run(given):
            schedule = attention_schedule(**given | schedule_for)
            return paged_attention(**given, **static, **options, schedule=schedule)

        with building_for("NVIDIA H200"):
            return jax.eval_shape(run, given)

    assert attend(dict(given), {}).shape == given["q"].shape
    # What may differ from layer to layer does not matter.
    assert attend(dict(given), {}, soft_cap=3.0, return_lse=True)[0].shape == given["q"].shape
    for changes, options, words in (
        (
            dict(max_q_len=1),
            {},
            "made for max_q_len=1, this call has 5: make it with attention_sch",
        ),
        (dict(sliding_window=None), {}, "made for window=False, this call has True"),
        ({}, dict(implementation="reference"), "made for implementation='mosaic_gpu', this call"),
        ({}, dict(fixed_split=64), "fixed_split=64 belongs to the schedule"),
    ):
        with pytest.raises(ValueError, match=words):
            attend(dict(given), changes, **options)


@pytest.mark.parametrize("shape", [(R + 1, HQ, D), (R, D)])
def test_decode_wants_one_query_per_row(shape):
    given = arguments(q=S(shape, jnp.float32))
    del given["cu_q_lens"]
    with pytest.raises(ValueError, match="with one query for each row of"):
        decode(**given)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(k_pages=STACKED, v_pages=STACKED, layer=1),
        dict(k_pages=STACKED, v_pages=STACKED, layer=S((), jnp.int32)),
        dict(sliding_window=S((), jnp.int32), soft_cap=3, sinks=S((HQ,), jnp.bfloat16)),
        dict(causal=False, max_q_len=100, sm_scale=S((), jnp.float32), return_lse=True),
    ],
)
def test_explain_takes_shapes(changes):
    told = explain(**arguments(**changes))
    assert told.implementation == "reference"
    assert told.target.platform == "cpu"
    assert "plain jax.numpy" in str(told)


DECLINED = {
    "mosaic_gpu": r"its kernels are for NVIDIA GPUs from Ampere on \(A100, .* by name\), not cpu",
    "mosaic_tpu": "its kernel is for TPUs from v5e and v5p on, not cpu",
}


@pytest.mark.parametrize("name", DECLINED)
def test_native_implementations_decline_by_name(name):
    words = f"{name}: {DECLINED[name]}"
    for asked in (name, [name], ("mosaic_tpu", "mosaic_gpu")):
        with pytest.raises(NotImplementedError, match=words):
            paged_attention(**arguments(), implementation=asked)
        told = explain(**arguments(), implementation=asked)
        assert told.implementation is None
        assert str(told).startswith("nothing on")
    told = explain(**arguments(), implementation=[name, "reference"])
    assert told.implementation == "reference"
    assert [n for n, _ in told.reasons] == [name, "reference"]


def test_implementations_lists_this_machine():
    listed = {name: (serves, reason) for name, serves, reason in implementations()}
    assert list(listed) == ["mosaic_gpu", "mosaic_tpu", "reference"]
    assert [serves for serves, _ in listed.values()] == ["no", "no", "first"]
    assert "for NVIDIA GPUs from Ampere on" in listed["mosaic_gpu"][1]
    assert "for TPUs from v5e and v5p on" in listed["mosaic_tpu"][1]


@pytest.fixture(autouse=True)
def _nothing_tuned():
    with tuning.use([]):
        yield


@pytest.mark.parametrize(
    ("kind", "platform", "serve", "reason"),
    [
        ("NVIDIA H200", "cuda", ["yes", "no", "first"], "`paxattn bench --tune` there once"),
        ("Tesla T4", "cuda", ["no", "no", "first"], "Tesla T4 is older"),
        ("TPU v5 lite", "tpu", ["no", "first", "yes"], "a ragged kernel for decode and prefill"),
        ("TPU v5", "tpu", ["no", "first", "yes"], "a ragged kernel for decode and prefill"),
        ("TPU v6 lite", "tpu", ["no", "first", "yes"], "a ragged kernel for decode and prefill"),
        ("TPU7x", "tpu", ["no", "first", "yes"], "a ragged kernel for decode and prefill"),
        ("TPU v4", "tpu", ["no", "no", "first"], "for TPUs from v5e and v5p on, not TPU v4"),
    ],
)
def test_implementations_lists_what_other_machines_would_use(kind, platform, serve, reason):
    with building_for(kind, platform):
        listed = implementations()
    assert [serves for _, serves, _ in listed] == serve
    why = {name: reason for name, _, reason in listed}
    assert reason in why["mosaic_tpu" if platform == "tpu" else "mosaic_gpu"]


def building_for(device_kind, platform="cuda"):
    device = AbstractDevice(device_kind, None, platform)
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def tuned(name, device="NVIDIA H200", **key):
    return tuning.Entry(device=device, kernel=f"mosaic_gpu.{name}", key=key, config={})


def on_hopper(*, heads=(32, 8), head_dim=128, page_size=16, dtype=jnp.bfloat16, tokens=R, **more):
    """A decode step, as shapes, that the GPU kernels serve."""
    pages = S((L, N, heads[1], page_size, head_dim), dtype)
    return arguments(
        q=S((tokens, heads[0], head_dim), dtype), k_pages=pages, v_pages=pages,
        **dict(layer=S((), jnp.int32), max_q_len=1) | more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), "decode kernel, 8 query rows per KV head"),
        (dict(heads=(16, 1), dtype=jnp.float16, page_size=128), "decode kernel, 16 query rows"),
        (dict(max_q_len=5, tokens=8, head_dim=80), "decode kernel, 24 query rows per KV head"),
        (dict(dtype=jnp.float32), "dtype float32 is not one that the tensor cores take"),
        (dict(head_dim=48), "head_dim=48 is not one of (64, 80, 96, 112, 128, 192, 256)"),
        (dict(page_size=5), "page_size=5 is not one of (8, 16, 32, 64, 128)"),
        (
            dict(max_q_len=20, tokens=40),
            "prefill kernel; rows of at most 4: decode kernel, 16 query rows per KV head",
        ),
        (dict(max_q_len=9, tokens=40, heads=(24, 1)), "rows of at most 1: decode kernel, 24 query"),
        (dict(heads=(64, 1), head_dim=256), "prefill kernel"),
    ],
)
def test_the_choice_for_hopper(changes, reason):
    """By the device that code is built for; tracing the whole op needs no GPU either."""
    given = on_hopper(**changes)
    with building_for("NVIDIA H200"):
        told = explain(**given, implementation="mosaic_gpu")
        assert told.reasons[0][0] == "mosaic_gpu"
        assert reason in told.reasons[0][1]
        if "kernel" in reason:
            assert told.implementation == "mosaic_gpu"
            static = {"max_q_len": given.pop("max_q_len")}
            out = jax.eval_shape(
                lambda given: paged_attention(
                    **given, **static, return_lse=True, implementation="mosaic_gpu"
                ),
                given,
            )
            assert out[0].shape == given["q"].shape
            # By itself where it is known to work only.
            told = explain(**given, **static)
            assert told.implementation == "reference"
            assert "not checked on NVIDIA H200 yet: run `paxattn bench --tune --heads" in str(told)
            with tuning.use([tuned("decode"), tuned("prefill")]):
                assert explain(**given, **static).implementation == "mosaic_gpu"
        else:
            with pytest.raises(NotImplementedError, match="cannot serve this on NVIDIA H200"):
                paged_attention(**given, implementation="mosaic_gpu")


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 has no such kernels")
@pytest.mark.parametrize(
    "kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "NVIDIA B200"]
)
def test_the_choice_for_other_gpus(kind):
    given = on_hopper(max_q_len=100, tokens=200)
    static = {"max_q_len": given.pop("max_q_len")}
    with building_for(kind):
        told = explain(**given, **static, implementation="mosaic_gpu")
        assert told.implementation == "mosaic_gpu"
        assert re.search(r"portable \(sm_\d+\) prefill kernel; rows of", told.reasons[0][1])
        op = functools.partial(paged_attention, **static, implementation="mosaic_gpu")
        out = jax.eval_shape(lambda given: op(**given), given)
        assert out.shape == given["q"].shape
        told = explain(**given, **static)
        assert told.implementation == "reference"
        assert "mosaic_gpu.portable_decode and mosaic_gpu.portable_prefill not checked" in str(told)
        entries = [tuned(f"portable_{name}", device=kind) for name in ("decode", "prefill")]
        with tuning.use(entries):
            assert explain(**given, **static).implementation == "mosaic_gpu"


@pytest.mark.parametrize(
    "entries",
    [
        [tuned("decode")],  # not the other kernel that the batch needs
        [tuned("decode", device="NVIDIA H100"), tuned("prefill", device="NVIDIA H100")],
        [tuned("decode", page_dtype="int8"), tuned("prefill", page_dtype="int8")],
        [tuned("portable_decode"), tuned("portable_prefill")],
    ],
)
def test_runs_of_something_else_make_no_kernel_the_default(entries):
    given = on_hopper(max_q_len=100, tokens=200)
    with building_for("NVIDIA H200"), tuning.use(entries):
        told = explain(**given)
        assert told.implementation == "reference"
        assert "mosaic_gpu.prefill not checked on NVIDIA H200" in told.reasons[0][1]
        assert explain(**given, implementation="mosaic_gpu").implementation == "mosaic_gpu"
        assert [serves for _, serves, _ in implementations()] == ["yes", "no", "first"]


@pytest.mark.parametrize(
    ("changes", "page_dtype"),
    [
        (dict(), None),
        (dict(max_q_len=100, tokens=200, heads=(24, 2), page_size=32), None),
        (dict(), "int8"),
        (dict(head_dim=192), "int8"),  # (of the portable kernels)
        (dict(max_q_len=100, tokens=200, page_size=8), "float8_e4m3fn"),  # (one of each)
    ],
)
def test_tuning_with_the_options_that_the_reason_names_makes_kernels_the_default(
    changes, page_dtype
):
    given = on_hopper(**changes)
    if page_dtype is not None:
        if jax.__version_info__ < (0, 11):
            pytest.skip("kernels read quantised pages from jax 0.11 on")
        pages, scales = given["k_pages"].shape, S(given["k_pages"].shape[:-1], jnp.bfloat16)
        given |= {name: S(pages, page_dtype) for name in ("k_pages", "v_pages")}
        given |= dict(k_scales=scales, v_scales=scales)
    with building_for("NVIDIA H200"):
        told = explain(**given)
        assert told.implementation == "reference"
        options = re.search("`paxattn bench --tune (.*?)`", told.reasons[0][1])[1].split()
        named = dict(zip(options[::2], options[1::2], strict=True))
        heads, kv_heads = map(int, named.pop("--heads").split("/"))
        work = measure.Workload(
            rows=measure.parse_rows("2x64+1x512/512"),
            num_q_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=int(named.pop("--head-dim")),
            page_size=int(named.pop("--page-size")),
            dtype=named.pop("--dtype"),
            page_dtype=named.pop("--kv-dtype", None),
        )
        assert not named
        questions = tune.questions_of(work, "mosaic_gpu")
        with tuning.use([question.entry(question.default) for question in questions]):
            assert explain(**given).implementation == "mosaic_gpu"


def test_tuned_kernels_are_tried_first():
    with building_for("NVIDIA H200"), tuning.use([tuned("decode"), tuned("prefill")]):
        assert [serves for _, serves, _ in implementations()] == ["first", "no", "yes"]


@pytest.mark.parametrize(
    ("kind", "reason"), [("Tesla T4", "Tesla T4 is older"), ("AMD Instinct", "not AMD Instinct")]
)
def test_gpus_without_kernels_take_the_reference(kind, reason):
    with building_for(kind):
        told = explain(**on_hopper())
    assert told.implementation == "reference"
    assert told.reasons[0][1].endswith(reason)


def test_kernels_are_imported_when_needed_only():
    code = """
import sys, paxattn
from paxattn.attention import implementations
implementations()
kernels = [m for m in sys.modules if m.startswith("jax.experimental.pallas")]
assert not kernels, kernels
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_shard_map_must_not_ask_what_kernels_cannot_tell():
    mesh = AbstractMesh(
        (1,), ("x",), abstract_device=AbstractDevice("NVIDIA H200", None, "cuda"),
        axis_types=(AxisType.Auto,),
    )  # fmt: skip
    given = on_hopper()
    heads, pages = PartitionSpec(None, "x"), PartitionSpec(None, None, "x")
    arrays = given.pop("q"), given.pop("k_pages"), given.pop("v_pages")
    names = ("block_tables", "kv_lens", "cu_q_lens")
    lens = {name: jnp.zeros(given[name].shape, jnp.int32) for name in names}

    def run(check_vma):
        f = lambda q, k, v: paged_attention(  # noqa: E731
            q, k, v, layer=0, max_q_len=1, implementation="mosaic_gpu", **lens
        )
        sharded = jax.shard_map(
            f, in_specs=(heads, pages, pages), out_specs=heads, check_vma=check_vma
        )
        return jax.eval_shape(sharded, *arrays)

    with use_abstract_mesh(mesh):
        assert run(False).shape == arrays[0].shape
        with pytest.raises(NotImplementedError, match="only with check_vma=False"):
            run(True)


def test_an_accelerator_on_the_reference_is_warned_once(monkeypatch):
    monkeypatch.setattr(choice, "_warned", set())
    with building_for("NVIDIA H200"):
        told = explain(**arguments())
        assert (told.implementation, told.target.platform) == ("reference", "gpu")
        assert told.reasons[0][0] == "mosaic_gpu"
        assert told.reasons[0][1].startswith("dtype float32 is not one that the tensor cores take")
        with pytest.warns(UserWarning, match="slower reference on NVIDIA H200: mosaic_gpu: dtype"):
            jax.eval_shape(lambda x: paged_attention(**x), arguments())
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the second time, and when it was asked for: silence
            jax.eval_shape(lambda x: paged_attention(**x), arguments())
            choice._warned.clear()
            jax.eval_shape(lambda x: paged_attention(**x, implementation="reference"), arguments())


def test_options_given_as_data_or_as_numbers_share_a_compilation(caplog):
    inputs = cases.make(cases.Case(q_lens=(1,), kv_lens=(9,), page_size=4, layers=2, max_q_len=1))
    arrays = [jnp.asarray(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages)]
    options, typed = inputs.options, dict(layer=jnp.int32(1), sliding_window=jnp.int32(3))
    with jax.log_compiles():
        first = paged_attention(*arrays, **options | dict(sliding_window=3, sm_scale=0.1))
        again = paged_attention(*arrays, **options | typed, sm_scale=jnp.float32(0.1))
        paged_attention(*arrays, **options | dict(layer=0, sliding_window=None))
    compiled = [x for x in caplog.messages if x.startswith("Compiling") and "paged_attention" in x]
    assert len(compiled) == 1, compiled
    np.testing.assert_array_equal(np.asarray(first), np.asarray(again))


def test_public_names():
    assert set(attention.__all__) == {
        "AttentionSchedule", "Explanation", "attention_schedule", "explain", "implementations",
        "paged_attention", "paged_attention_decode",
    }  # fmt: skip
    for name in attention.__all__:
        assert getattr(attention, name).__doc__
