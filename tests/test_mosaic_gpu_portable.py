"""The portable GPU kernels: in Pallas' interpreter, and with copies that come at their latest.

The interpreter runs the form for Blackwell (TMA) but for the product, and that for Ampere with
plain copies: that waits are long enough there is tested by a stand-in for `cp.async`.
"""

import dataclasses
import functools
import itertools
import math
import re

import attention_cases as cases
import gpu_interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case
from gpu_interpreter import as_float64, call, check, interpreted, run

from paxattn.attention import tuning
from paxattn.attention.checks import Request
from paxattn.attention.mosaic_gpu import common, config, support, tunable
from paxattn.attention.mosaic_gpu.portable import cards, fold, ring
from paxattn.attention.mosaic_gpu.portable import config as portable
from paxattn.attention.mosaic_gpu.prefill_config import Config as PrefillConfig
from paxattn.attention.mosaic_gpu.prefill_work import Walk
from paxattn.target import Target

pytestmark = pytest.mark.timeout(240)
CARDS = {"tma": cards.card_of("NVIDIA B200"), "cp.async": cards.card_of("NVIDIA A100-SXM4-80GB")}
B200 = CARDS["tma"]
NEW = jax.__version_info__ >= (0, 11)
NEEDS_NEW = pytest.mark.skipif(not NEW, reason="the portable kernels need jax 0.11")
BF16, F16 = dict(dtype="bfloat16"), dict(dtype="float16")
EDGES = dict(q_lens=(1, 0, 1, 1, 1, 0), kv_lens=(1, 0, 15, 16, 17, 40), max_q_len=1)


@pytest.fixture(autouse=True)
def _clean():
    with jax.numpy_dtype_promotion("strict"):
        yield
    gpu_interpreter.reset()


# Numbers, races and poisoned memory, in the interpreter.


def slow(*args, **options):
    return pytest.param(Case(*args, **options), marks=pytest.mark.slow)


DECODE = (
    Case(**EDGES, **BF16, page_dtype="int8", padding=2, layers=2, window=64, page_size=8),
    # (a unit in many pieces, soft cap, sinks, a window that begins inside a page)
    Case(
        q_lens=(1, 1), kv_lens=(523, 37), **F16, max_q_len=1, heads=(4, 1), soft_cap=50.0,
        sinks=True, window=330, page_size=8,
    ),
    slow(q_lens=(1, 1), kv_lens=(128, 129), **BF16, head_dim=128, page_size=128, heads=(2, 2)),
    slow(q_lens=(1,), kv_lens=(100,), **BF16, head_dim=256, page_size=32, heads=(16, 1)),
    Case(q_lens=(1,), kv_lens=(70,), **F16, head_dim=80, heads=(5, 1), page_size=32),
    # speculation: a few new tokens per row, rows that see nothing
    Case(
        q_lens=(5, 1, 0, 3), kv_lens=(18, 130, 0, 64), **BF16, heads=(4, 2), sinks=True,
        soft_cap=30.0, window=9,
    ),
    slow(q_lens=(9, 1, 1), kv_lens=(5, 0, 70), **BF16, heads=(4, 2), padding=3),
    Case(q_lens=(4, 4), kv_lens=(30, 5), **BF16, causal=False, page_size=64, heads=(15, 1)),
    slow(q_lens=(5, 1), kv_lens=(18, 130), **F16, page_dtype="float8_e4m3fn", page_size=128),
    slow(q_lens=(1, 1), kv_lens=(90, 7), **BF16, page_dtype="int8", head_dim=192, page_size=8),
)  # fmt: skip
PREFILL = (
    # (rows without tokens or queries, queries before their sequence's start, several items per CTA)
    Case(
        q_lens=(3, 70, 0, 9, 9), kv_lens=(10, 263, 40, 5, 0), **BF16, heads=(4, 2), layers=2,
        padding=5,
    ),
    # (a group that does not divide a tile; a window that begins inside a page; a plain block)
    Case(q_lens=(50,), kv_lens=(450,), **BF16, heads=(3, 1), head_dim=128, window=290, page_size=8),
    slow(q_lens=(5,), kv_lens=(300,), **BF16, heads=(14, 2), causal=False, soft_cap=5.0),
    Case(q_lens=(40,), kv_lens=(170,), **F16, heads=(2, 1), head_dim=256, page_size=128, window=70),
    slow(
        q_lens=(40,), kv_lens=(170,), **BF16, page_dtype="float8_e4m3fn", heads=(2, 1),
        head_dim=128, page_size=128,
    ),
    slow(q_lens=(30,), kv_lens=(99,), **F16, page_dtype="int8", heads=(3, 1), head_dim=96),
)  # fmt: skip
MIXED = Case(
    q_lens=(1, 40, 0, 3, 1), kv_lens=(130, 90, 9, 70, 0), **BF16, heads=(16, 2), padding=3,
    layers=2, sinks=True, soft_cap=30.0, window=77,
)  # fmt: skip
MIXED_BY_COPIES = {"tma": MIXED, "cp.async": dataclasses.replace(MIXED, page_dtype="int8")}


@interpreted
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_matches_oracle_and_reads_no_poison(case):
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs), card=B200), widened=True)


@interpreted
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_matches_oracle_and_reads_no_poison(case):
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs), card=B200, short=0), widened=True)


@interpreted
def test_pieces_of_few_long_rows_are_merged():
    case = Case(q_lens=(9, 3), kv_lens=(1400, 5), **BF16, heads=(4, 1), sinks=True)
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs), card=B200, short=0, split_over=8))


@interpreted
@pytest.mark.parametrize("copies", CARDS)
def test_a_mixed_batch_in_other_block_sizes(copies):
    inputs = cases.make(MIXED_BY_COPIES[copies])
    prefill = PrefillConfig(block_kv=32, stages=3, num_ctas=4)
    got = run(cases.poison(inputs), card=CARDS[copies], block_kv=32, stages=3, prefill=prefill)
    check(inputs, got, widened=True)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("copies", CARDS)
@pytest.mark.parametrize("case", gpu_interpreter.grid(), ids=str)
def test_whole_grid(case, copies):
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs), card=CARDS[copies]), widened=True)


@interpreted
def test_traced_window_layer_and_jit():
    inputs = cases.poison(cases.make(Case(**EDGES, **BF16, layers=2, heads=(2, 1), window=9)))
    step = jax.jit(
        lambda window, layer: call(inputs, sliding_window=window, layer=layer, card=B200)
    )
    for window in (9, 0):
        case = dataclasses.replace(inputs.case, window=window or None)
        o, lse = step(jnp.int32(window), jnp.int32(1))
        check(dataclasses.replace(inputs, case=case), as_float64(inputs, (o, lse)))


@interpreted
def test_with_a_fixed_split_the_batch_does_not_change_a_row():
    case = Case(q_lens=(1, 20, 1), kv_lens=(200, 90, 70), **BF16, heads=(4, 1))
    inputs = cases.make(case)
    fixed = run(inputs, split=128, card=B200)
    check(inputs, fixed)
    other = dataclasses.replace(inputs, kv_lens=np.asarray([200, 90, 3], np.int32))
    got = run(other, split=128, cores=2, ctas=1, card=B200)
    for new, old in zip(got, fixed, strict=True):
        np.testing.assert_array_equal(new[:21], old[:21])


@interpreted
@pytest.mark.parametrize("short", [None, 0])
def test_a_missing_page_hides_what_follows(short):
    """A sentinel (or any number that is no page) where tokens should be must leak nobody's KV."""
    case = Case(q_lens=(2,) * 4, kv_lens=(60,) * 4, **BF16, heads=(2, 1), causal=False)
    inputs = cases.make(case)
    inputs.block_tables[:, 1] = len(inputs.owned), -1, len(inputs.owned) + 7, 2**31 - 1
    got = run(inputs, card=B200, short=short)
    check(dataclasses.replace(inputs, kv_lens=np.full(4, 16, np.int32)), got)


@interpreted
@pytest.mark.parametrize("short", [None, 0])
def test_pages_behind_the_window_may_be_missing(short):
    case = Case(q_lens=(1, 1, 2), kv_lens=(300, 90, 150), **BF16, heads=(2, 1), window=40)
    inputs = cases.make(case)
    got = run(cases.poison(cases.leave_behind(inputs)), card=B200, short=short)
    check(inputs, got)


@interpreted
@pytest.mark.parametrize("short", [None, 0])
def test_many_pages(short):
    case = Case(q_lens=(1, 2), kv_lens=(90, 17), **BF16, heads=(1, 1), page_size=8)
    inputs = cases.make(case)
    far = cases.scatter(inputs)
    check(far, run(far, card=B200, short=short))


# `cp.async`, as late, or as early, as it may come.


class Memory:
    """A reference: a view of a NumPy array."""

    def __init__(self, array):
        self.array = array

    at = property(lambda self: self)
    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    def __getitem__(self, place):
        def plain(i):
            if isinstance(i, slice) or not hasattr(i, "size"):
                return i if isinstance(i, slice) else int(i)
            if isinstance(i, jax.Array):
                return int(i)
            return slice(int(i.start), int(i.start) + i.size)

        place = place if isinstance(place, tuple) else (place,)
        found = self.array[tuple(map(plain, place))]
        return Memory(found) if isinstance(found, np.ndarray) else jnp.asarray(found)

    def transpose(self, axes):
        return Memory(self.array.transpose(axes))


class Device:
    """What the kernels use of `plgpu`; copies are done when they are asked for, or when awaited."""

    def __init__(self, *, late):
        self.late, self.under_way = late, []

    OOBFillMode = fold.mosaic_gpu.OOBFillMode

    class Layout:
        MMA_ACC = MMA_LHS = MMA_RHS = staticmethod(
            lambda *args, **options: type("Any", (), {"reduce": lambda self, axis: self})()
        )

    def copy_gmem_to_smem(self, source, target, oob_mode):
        self.under_way.append((source, target))
        if not self.late:
            self.finish(0)

    def wait_gmem_to_smem(self, n):
        self.finish(n)

    def finish(self, left):
        while len(self.under_way) > left:
            source, target = self.under_way.pop(0)
            target.array[...] = source.array

    @staticmethod
    def layout_cast(x, layout):
        return x

    @staticmethod
    def broadcasted_iota(dtype, shape, axis, layout):
        return jax.lax.broadcasted_iota(dtype, shape, axis)

    @staticmethod
    def mma(acc, a, b):
        return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    ("stages", "blocks", "page_dtype"),
    [
        (2, 1, None), (2, 4, None), (3, 2, None), (3, 5, None), (4, 3, None), (4, 6, None),
        pytest.param(2, 3, "int8", marks=NEEDS_NEW), pytest.param(3, 5, "int8", marks=NEEDS_NEW),
    ],
)  # fmt: skip
def test_waits_are_long_enough_for_cp_async(monkeypatch, late, stages, blocks, page_dtype):
    """A tile of a job reads each block when it has come, and none that has been overwritten."""
    device, rng = Device(late=late), np.random.default_rng(0)
    for module in (fold, ring):
        monkeypatch.setattr(module, "plgpu", device)
    for module in (fold, ring, common):
        monkeypatch.setattr(module, "load", lambda ref, layout: jnp.asarray(ref.array))
    for module in (fold, common):
        monkeypatch.setattr(
            module, "store", lambda ref, x: ref.array.__setitem__(..., np.asarray(x))
        )
    rows, dim, page, block = 32, 64, 8, 32
    t = ring.Tile(
        rows=rows, head_dim=dim, page_size=page, num_pages=40, max_pages=24, group=1, causal=False,
        window=False, soft_cap=None, dtype=np.float16, block_kv=block, stages=stages, tma=False,
        interpret=False, page_dtype=page_dtype,
    )  # fmt: skip
    tokens = blocks * block - 5
    pool = rng.standard_normal((2, 1, 40, 1, page, dim)).astype(np.float16)
    table = rng.permutation(40)[:24].astype(np.int32)
    scale = jnp.float32(0.125 * math.log2(math.e))
    given, scales, narrow = pool, (), np.float16
    if page_dtype is not None:
        given, scales = cases.quantize(pool, page_dtype)
        narrow, pool = given.dtype, given * scales.astype(np.float32)[..., None]
        held = np.isin(np.arange(40), table[: -(-tokens // page)])
        scales = np.where(held[:, None, None], scales, np.asarray(np.nan, scales.dtype))
        scales[:, :, table[tokens // page], :, tokens % page :] = np.nan
    pools = ring.Pools(*map(Memory, given), Memory(table[None]), 0, 1, scale, *map(Memory, scales))
    nothing = np.nan if page_dtype is None else 99
    empty = [np.full((stages, block, dim), nothing, narrow) for _ in range(2)]
    empty.append(np.full((rows, block), np.nan, np.float16))
    wide = Memory(np.full((block, dim), np.nan, np.float16))
    zero = jnp.int32(0)
    walk = Walk(zero, jnp.int32(blocks), plain=zero, num_plain=jnp.int32(blocks - 1))
    job = ring.Job(zero, zero, jnp.int32(tokens), zero, zero, walk)
    q = rng.standard_normal((rows, dim)).astype(np.float16)
    with jax.disable_jit(), jax.numpy_dtype_promotion("standard"):
        smem = ring.Ring(*map(Memory, empty), wide=wide)
        acc, total, _ = fold.attend(t, pools, smem, job, Memory(q))
    k, v = (x[0, table, 0].reshape(-1, dim)[:tokens].astype(np.float64) for x in pool)
    s = q.astype(np.float64) @ k.T * 0.125
    p = np.exp(s - s.max(1, keepdims=True))
    got = np.concatenate(acc, axis=1) / np.asarray(total)[:, None]
    np.testing.assert_allclose(got, p / p.sum(1, keepdims=True) @ v, atol=2e-3)
    assert len(device.under_way) == 0


# Who is served, and in which block sizes.


def request(**changes):
    given = dict(
        num_tokens=8, num_rows=8, num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16,
        num_pages=100, max_pages_per_seq=64, num_layers=2, dtype="bfloat16", max_q_len=1,
        causal=True, window=False, soft_cap=False, sinks=False, return_lse=False,
    )  # fmt: skip
    return Request(**given | changes)


A100 = Target(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("NVIDIA A100-SXM4-80GB", r"sm_80 \(cp.async"),
        ("NVIDIA GeForce RTX 3090", r"sm_86 \(cp.async"),
        ("NVIDIA GeForce RTX 4090", r"sm_89 \(cp.async"),
        ("NVIDIA RTX 2000 Ada Generation", r"sm_89 \(cp.async"),
        ("NVIDIA B200", r"sm_100 \(TMA"),
        ("NVIDIA GeForce RTX 5090", r"sm_120 \(TMA"),
        ("Tesla T4", "came with Ampere: Tesla T4 is older"),
        ("Tesla V100-SXM2-16GB", "is older"),
        ("NVIDIA GeForce RTX 2080 Ti", "is older"),
        ("Quadro RTX 4000", "is older"),
        ("Radeon", r"from Ampere on .*, not Radeon"),
        ("NVIDIA H200", "kernels for NVIDIA Hopper GPUs"),
    ],
)
def test_each_card_is_told_its_kernels_or_why_not(kind, reason):
    target = Target(platform="gpu", device_kind=kind)
    card = cards.card_of(kind)
    served = card is not None and (NEW or card.hopper)
    if card is not None and not served:
        reason = f"{kind} need jax 0.11"
    if served:
        told = support.check(None, target)
    else:
        with pytest.raises(NotImplementedError) as error:
            support.check(None, target)
        told = str(error.value)
    assert re.search(reason, told), told


@NEEDS_NEW
def test_requests_are_told_which_kernel_serves():
    def told(**changes):
        return support.check(request(**changes), A100)

    assert told() == "portable (sm_80) decode kernel, 16 query rows per KV head"
    assert "32 query rows" in told(max_q_len=8)
    assert "32 query rows" in told(head_dim=80, page_size=32)
    assert told(max_q_len=512).startswith("portable (sm_80) prefill kernel; rows of at most 4")
    assert told(num_q_heads=80, num_kv_heads=1, max_q_len=2) == "portable (sm_80) prefill kernel"
    for changes, reason in (
        (dict(dtype="float32"), "float32"),
        (dict(head_dim=72), "head_dim=72"),
        (dict(page_size=256), "page_size=256"),
        (dict(ancestors=True), "ancestor masks"),
        (dict(head_dim=80, page_size=16), "page_size=16 with head_dim=80"),
        (dict(page_dtype="int8", head_dim=112), "page_size=16 with head_dim=112"),
        (dict(page_dtype="float8_e4m3fn"), "sm_80 has no instruction that converts fp8"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            told(**changes)


def test_candidates_fit_and_the_heuristic_is_one_of_them():
    for card, head_dim, page_size, quantized in itertools.product(
        {card for _, card in cards._CARDS}, config.HEAD_DIMS, support.PAGE_SIZES, (False, True)
    ):
        common = dict(head_dim=head_dim, quantized=quantized)
        for rows in (16, 32, portable.max_rows(head_dim)):
            found = portable.decode_configs(card, page_size=page_size, rows=rows, **common)
            assert len(found) == len(set(found)) > 0
            for one in found:
                needed = portable.shared_bytes(
                    block_kv=one.block_kv, stages=one.stages, rows=rows, **common
                )
                per_sm = one.num_cores // card.num_sms
                assert per_sm * (needed + 1024) < card.shared_bytes
        assert portable.prefill_configs(card, page_size=page_size, **common)
    split = portable.decode_configs(B200, rows=16, head_dim=128, page_size=16, split=96)
    assert {one.block_kv for one in split} == {32}


def test_a_tuned_config_serves_its_card_alone():
    asked = dict(dtype="bfloat16", head_dim=128, page_size=16)
    pick = functools.partial(tunable.decode_config, CARDS["cp.async"], rows=16, **asked)
    heuristic, *_, other = portable.decode_configs(
        CARDS["cp.async"], rows=16, head_dim=128, page_size=16
    )
    entry = tuning.Entry(
        device=A100.device_kind,
        kernel="mosaic_gpu.portable_decode",
        key=asked | {"rows": 16},
        config={name: getattr(other, name) for name in ("block_kv", "stages", "num_cores")},
    )
    with tuning.use([entry]):
        assert pick(device=A100.device_kind) == other
        assert pick(device="NVIDIA A30") == heuristic
