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
from paxattn.attention.mosaic_gpu import config
from paxattn.models import Decoder, DecoderConfig
from paxattn.page_table import init_page_table
from paxattn.ragged import ragged_batch

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
