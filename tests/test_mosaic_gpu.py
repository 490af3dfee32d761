"""The GPU implementation as a whole: who serves which rows, and what is done once per step."""

import dataclasses
import re

import attention_cases as cases
import gpu_interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case
from flax import nnx
from gpu_interpreter import check, interpreted, run
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from paxattn import kv_cache
from paxattn.attention.checks import Request
from paxattn.attention.mosaic_gpu import config, support
from paxattn.attention.mosaic_gpu.portable import cards
from paxattn.models import Decoder, DecoderConfig
from paxattn.page_table import init_page_table
from paxattn.ragged import ragged_batch
from paxattn.target import Target

pytestmark = pytest.mark.timeout(240)
BF16, F16 = dict(dtype="bfloat16"), dict(dtype="float16")


@pytest.fixture(autouse=True)
def _clean():
    with jax.numpy_dtype_promotion("strict"):
        yield
    gpu_interpreter.reset()


MIXED = (
    # decode, speculation, chunked prefill and idle rows in one batch
    Case(
        q_lens=(1, 20, 0, 3, 1), kv_lens=(130, 90, 9, 70, 0), **BF16, heads=(16, 2), padding=3,
        layers=2, sinks=True, soft_cap=30.0, window=77, page_dtype="int8",
    ),
    Case(q_lens=(17, 1), kv_lens=(20, 65), **F16, heads=(24, 1), head_dim=80, page_size=8),
    # (a group too large for the decode kernel: the prefill kernel serves all rows)
    Case(q_lens=(1, 2), kv_lens=(3, 150), **BF16, heads=(32, 1), head_dim=256, page_size=32),
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_a_mixed_batch(case):
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs)), widened=gpu_interpreter.long_tokens(case))


BEYOND = (  # (what Hopper's own prefill kernel declines)
    Case(
        q_lens=(1, 20, 0, 3), kv_lens=(130, 90, 9, 70), **BF16, heads=(4, 1), head_dim=256,
        page_dtype="int8", padding=3, window=77,
    ),
    pytest.param(
        Case(
            q_lens=(1, 20, 3), kv_lens=(130, 90, 70), **F16, heads=(4, 2), page_size=8,
            page_dtype="float8_e4m3fn", soft_cap=30.0,
        ),
        marks=pytest.mark.slow,
    ),
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("case", BEYOND, ids=str)
def test_a_mixed_batch_of_hoppers_own_decode_kernel_and_the_portable_prefill_kernel(case):
    inputs = cases.make(case)
    got = run(cases.poison(inputs), long_card=cards.card_of("NVIDIA H200"))
    check(inputs, got, widened=gpu_interpreter.long_tokens(case))


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("case", gpu_interpreter.grid(), ids=str)
def test_whole_grid(case):
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs)), widened=gpu_interpreter.long_tokens(case))


@interpreted
def test_with_a_fixed_split_a_mixed_batch_does_not_change_a_row():
    case = Case(q_lens=(1, 20, 1), kv_lens=(200, 90, 130), **BF16, heads=(8, 1))
    inputs = cases.make(case)
    fixed = run(inputs, split=128)
    check(inputs, fixed)
    other = dataclasses.replace(inputs, kv_lens=np.asarray([200, 90, 3], np.int32))
    for got, want in zip(run(other, split=128, cores=2, ctas=1), fixed, strict=True):
        np.testing.assert_array_equal(got[:21], want[:21])


def test_rows_are_short_as_far_as_registers_reach():
    for head_dim in config.HEAD_DIMS:
        for group in range(1, 17):
            most = config.max_rows(head_dim)
            assert config.short_q_len(most // group, group, head_dim) == most // group
            assert config.short_q_len(most, group + 1, head_dim) * (group + 1) <= max(16, group + 1)
    assert config.short_q_len(1, 32, 256) == 0


# Which kernels serve.

H200 = Target(platform="gpu", device_kind="NVIDIA H200")
ASKED = dict(
    num_tokens=2048, num_rows=8, num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16,
    num_pages=100, max_pages_per_seq=64, num_layers=2, dtype="bfloat16", max_q_len=512,
    causal=True, window=False, soft_cap=False, sinks=False, return_lse=False,
)  # fmt: skip
OWN, PORTABLE = "prefill kernel", r"portable \(sm_90\) prefill kernel \(not Hopper's own: {}\)"
DECODE = "; rows of at most 4: decode kernel, 16 query rows per KV head"
NEEDS_NEW = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="quantised pages need jax 0.11 there"
)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(), OWN + DECODE),
        (dict(head_dim=256, page_size=8), OWN + DECODE),
        (dict(max_q_len=1), "decode kernel, 8 query rows per KV head"),
        (dict(max_q_len=1, head_dim=80), "decode kernel, 8 query rows per KV head"),
        (dict(num_q_heads=80, num_kv_heads=1, max_q_len=2), OWN),
    ],
)
def test_hoppers_own_kernels_serve_all_pages_of_floats(changes, told):
    assert support.check(Request(**ASKED | changes), H200) == told


@NEEDS_NEW
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(), OWN + DECODE),
        (dict(head_dim=256), PORTABLE.format(".* of head_dim 64, 128 only") + DECODE),
        (dict(page_size=8), PORTABLE.format(".* of 16 and more tokens only") + DECODE),
        (dict(head_dim=256, page_size=8, max_q_len=1), "decode kernel, 8 query rows per KV head"),
        (
            dict(head_dim=192, max_q_len=1),
            r"portable \(sm_90\) decode kernel \(not .* 64, 128, 256 only\), 16 query rows .*",
        ),
        (dict(head_dim=192), r"portable .* prefill .*; rows of at most 4: portable .* decode .*"),
    ],
)
@pytest.mark.parametrize("page_dtype", ["int8", "float8_e4m3fn"])
def test_the_portable_kernels_serve_quantised_pages_that_hoppers_own_decline(
    changes, told, page_dtype
):
    found = support.check(Request(**ASKED | changes, page_dtype=page_dtype), H200)
    assert re.fullmatch(told, found), found


@NEEDS_NEW
def test_quantised_pages_that_come_out_uneven_for_four_warps_are_declined():
    with pytest.raises(NotImplementedError, match="page_size=16 with head_dim=80"):
        support.check(Request(**ASKED | dict(head_dim=80), page_dtype="int8"), H200)


@NEEDS_NEW
@pytest.mark.parametrize(
    ("head_dim", "own", "size"), [(128, (True, True), 128), (256, (True, False), 32),
                                  (192, (False, False), 32)],
)  # fmt: skip
def test_a_plan_names_the_kernel_of_each_part(head_dim, own, size):
    lens = jnp.full((8,), 300, jnp.int32)
    made = support.schedule(
        Request(**ASKED | dict(head_dim=head_dim), page_dtype="int8"),
        H200,
        block_tables=jnp.zeros((8, 64), jnp.int32),
        kv_lens=lens,
        cu_q_lens=jnp.asarray([0, 200, *range(201, 208)], jnp.int32),
        sliding_window=None,
        fixed_split=None,
    )
    assert (made.short.card is None, made.long.card is None) == own
    assert (made.short.stored is None) == own[0]
    assert made.long.tiles.size == size
    assert {card.arch for card in (made.short.card, made.long.card) if card} <= {"sm_90"}


# What a step's program holds.

SHAPE = dict(
    vocab_size=64, hidden_size=128, intermediate_size=64, num_heads=8, num_kv_heads=2, head_dim=64
)


def program_of_step(*, num_tokens, max_q_len, windows=(), num_layers=3):
    """The jaxpr of a decoder's step for an H200, and of its loop over layers."""
    model = nnx.eval_shape(
        lambda: Decoder(
            DecoderConfig(**SHAPE, num_layers=num_layers, windows=windows),
            rngs=nnx.Rngs(0), dtype=jnp.bfloat16, stacked=True, implementation="mosaic_gpu",
        )
    )  # fmt: skip
    table = init_page_table(num_pages=40, page_size=16, max_seqs=4, max_pages_per_seq=8)
    cache = jax.eval_shape(
        lambda: kv_cache.init_kv_cache(
            num_layers=num_layers, num_pages=40, page_size=16, num_kv_heads=2, head_dim=64
        )
    )

    def step(model, table, cache, tokens, q_lens):
        batch = ragged_batch(table, q_lens, num_tokens=num_tokens, max_q_len=max_q_len)
        return model(tokens, batch, cache)

    device = AbstractDevice("NVIDIA H200", None, "cuda")
    with (
        use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)),
        jax.numpy_dtype_promotion("standard"),
    ):
        lens = jax.ShapeDtypeStruct((4,), jnp.int32)
        tokens = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
        jaxpr = jax.make_jaxpr(step)(model, table, cache, tokens, lens).jaxpr
    (loop,) = [e.params["jaxpr"] for e in jaxpr.eqns if e.primitive.name == "scan"]
    return str(jaxpr), str(loop)


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        (dict(num_tokens=4, max_q_len=1), {"paged_decode", "merge_parts"}),
        (dict(num_tokens=32, max_q_len=8), {"paged_decode", "merge_parts"}),
        (dict(num_tokens=64, max_q_len=64), {"paged_decode", "merge_parts", "paged_prefill"}),
    ],
)
def test_a_step_holds_only_the_kernels_that_it_may_need(options, kernels):
    whole, loop = program_of_step(**options)
    names = set(re.findall(r"\b(paged_decode|merge_parts|paged_prefill)\b", loop))
    assert names == kernels
    # What depends on the batch only is outside the loop, and there once.
    assert whole.count("name=plan_batch") == 1
    assert "plan_batch" not in loop
    for primitive in ("sort", "cumsum", "scatter-add", "argsort"):
        assert not re.search(rf"= {primitive}\b", loop), primitive


def test_layers_with_the_same_window_share_a_schedule():
    whole, loop = program_of_step(num_tokens=4, max_q_len=1, windows=(0, 32, 0))
    assert whole.count("name=plan_batch") == 2
    assert "plan_batch" not in loop


def test_pieces_of_any_number_are_merged_in_one_launch():
    """CUDA's grids are long along their first axis only (Pallas' last), else up to 65,535."""
    from paxattn.attention.mosaic_gpu.merge import merge

    slots = 64 * 8 * 256  # rows x KV heads x pieces, as of 131,072 tokens cut at multiples of 512
    shape = jax.ShapeDtypeStruct
    parts = shape((slots, 128, 16), jnp.float32), shape((slots, 16), jnp.float32)
    counts = shape((slots,), jnp.int32)
    traced = jax.make_jaxpr(lambda *args: merge(*args, out_dtype=jnp.bfloat16))(*parts, counts)
    grid = re.search(r"grid=\(([\d, ]+)\)", str(traced))[1]
    *others, last = map(int, grid.split(","))
    assert last == slots
    assert max(others) <= 65535
