"""The tuning table: what is in it is used, the heuristic otherwise, and tuning fills it."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from test_attention_api import building_for
from test_cli import in_process

from paxattn.attention import cut, measure, tune, tuning
from paxattn.attention.measure import Workload, parse_rows
from paxattn.attention.mosaic_gpu import config, prefill_config, tunable

HOPPER = dict(device="NVIDIA H200", dtype="bfloat16", head_dim=128, page_size=16)
ENTRY = tuning.Entry(
    device="NVIDIA H200",
    kernel="mosaic_gpu.decode",
    key={"dtype": "bfloat16", "head_dim": 128, "page_size": 16, "rows": 8},
    config={"block_kv": 64, "stages": 2, "num_cores": 132},
)
TINY = dict(num_q_heads=4, num_kv_heads=2, head_dim=16, page_size=8, dtype="float32")


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """The user's table, of this test alone."""
    path = tmp_path / "data" / "tuned.json"
    monkeypatch.setattr(tuning, "user_table", lambda: path)
    monkeypatch.setattr(tuning, "_warned", set())
    return path


def test_the_package_brings_what_was_measured_only():
    for entry in tuning.read(tuning.PACKAGE_TABLE):
        assert entry.measured["over_heuristic"] <= 1.0


def test_an_entry_serves_its_key_and_no_other(table):
    tuning.write(table, [ENTRY])
    tuned = config.Config(block_kv=64, stages=2, num_cores=132)
    assert tunable.decode_config(rows=8, **HOPPER) == tuned
    for change in (
        dict(rows=16), dict(device="NVIDIA H100"), dict(dtype="float16"), dict(head_dim=64),
        dict(page_size=32),
    ):  # fmt: skip
        other = dict(rows=8) | HOPPER | change
        heuristic = config.default_config(
            rows=other["rows"], head_dim=other["head_dim"], page_size=other["page_size"]
        )
        assert tunable.decode_config(**other) == heuristic, change
    # The split is the caller's; everything else about the pieces is the table's.
    assert tunable.decode_config(rows=8, split=256, **HOPPER) == dataclasses.replace(
        tuned, split=256
    )


@pytest.mark.parametrize("page_dtype", ["int8", "float8_e4m3fn"])
def test_quantised_pages_have_entries_of_their_own(table, page_dtype):
    given = dict(device="NVIDIA H200", kernel="mosaic_gpu.prefill")
    key = {"dtype": "bfloat16", "head_dim": 128, "page_size": 16}
    floats = tuning.Entry(**given, key=key, config={"block_kv": 64, "stages": 3, "num_ctas": 132})
    quantised = tuning.Entry(
        **given,
        key=key | {"page_dtype": page_dtype},
        config={"block_kv": 64, "stages": 4, "num_ctas": 132 * 32},
    )
    tuning.write(table, [floats, quantised, ENTRY])
    found = tunable.prefill_config(**HOPPER)
    assert (found.stages, found.wide) == (3, 0)
    found = tunable.prefill_config(**HOPPER, page_dtype=page_dtype)
    assert (found.stages, found.wide, found.num_ctas) == (4, 2, 132 * 32)
    # What was measured with pages of floats, or with others, says nothing of these.
    other = {"int8": "float8_e4m3fn", "float8_e4m3fn": "int8"}[page_dtype]
    heuristic = prefill_config.default_config(head_dim=128, quantized=True)
    assert tunable.prefill_config(**HOPPER, page_dtype=other) == heuristic
    heuristic = config.default_config(rows=8, head_dim=128, page_size=16, quantized=True)
    assert tunable.decode_config(rows=8, **HOPPER, page_dtype=page_dtype) == heuristic


def test_the_newest_entry_counts_and_the_others_stay(table):
    other = dataclasses.replace(ENTRY, device="NVIDIA H100")
    tuning.write(table, [ENTRY, other])
    newer = dataclasses.replace(ENTRY, config=ENTRY.config | {"stages": 4})
    tuning.write(table, [newer])
    assert sorted(tuning.read(table), key=lambda e: e.device) == [other, newer]
    assert tunable.decode_config(rows=8, **HOPPER).stages == 4


@pytest.mark.parametrize(
    "changes", [{"stages": 99}, {"block_kv": 50}, {"colour": 3}, {"stages": "many"}]
)
def test_what_cannot_be_built_is_passed_over_with_one_warning(table, changes):
    tuning.write(table, [dataclasses.replace(ENTRY, config=ENTRY.config | changes)])
    heuristic = config.default_config(rows=8, head_dim=128, page_size=16)
    with pytest.warns(UserWarning, match="run `paxattn bench --tune` again"):
        assert tunable.decode_config(rows=8, **HOPPER) == heuristic
    assert tunable.decode_config(rows=8, **HOPPER) == heuristic  # (a warning is an error here)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"entries": [{"device": "x"}]}', '{"entries": [3]}',
     '{"entries": [{"device": "x", "kernel": "y", "key": 1, "config": {}}]}'],
)  # fmt: skip
def test_a_damaged_table_is_an_error_that_names_it(table, text):
    table.parent.mkdir()
    table.write_text(text)
    with pytest.raises(ValueError, match=r"not a table of tuned configs.*or delete it") as error:
        tunable.decode_config(rows=8, **HOPPER)
    assert str(table) in str(error.value)
    with pytest.raises(ValueError, match="not a table"):
        tuning.write(table, [ENTRY])
    assert table.read_text() == text


def test_candidates_hold_the_heuristics_choice_and_fit():
    for rows, head_dim, page_size, quantized in (
        (8, 128, 16, False), (16, 64, 128, False), (48, 128, 8, False), (24, 256, 32, False),
        (8, 128, 16, True), (16, 64, 128, True), (48, 128, 8, True), (16, 256, 32, True),
    ):  # fmt: skip
        sizes = dict(rows=rows, head_dim=head_dim, quantized=quantized)
        found = list(tunable.decode_candidates(**sizes, page_size=page_size))
        assert config.default_config(**sizes, page_size=page_size) in found
        assert len(found) == len(set(found)) > 1
        for one in found:
            assert config.shared_bytes(one, **sizes) < config.SHARED_BYTES
    for quantized, head_dims in (
        (False, config.HEAD_DIMS), (True, prefill_config.QUANTIZED_HEAD_DIMS),
    ):  # fmt: skip
        for head_dim in head_dims:
            sizes = dict(head_dim=head_dim, quantized=quantized)
            found = list(tunable.prefill_candidates(**sizes, page_size=16))
            assert prefill_config.default_config(**sizes) in found
            assert len(found) == len(set(found)) > 1
    split = tunable.decode_candidates(rows=8, head_dim=128, page_size=16, split=64)
    assert {one.block_kv for one in split} == {64}


def test_rows_are_read():
    assert parse_rows("2x9") == ((1, 9),) * 2
    assert parse_rows("1x8/8+2x3/7") == ((8, 8), (3, 7), (3, 7))
    assert tune._short(parse_rows("1x131072+31x4096+2x3/7")) == "1x131072+31x4096+2x3/7"
    for bad in ("", "x", "2x", "0x5", "2x0", "2x9/8", "1x1+", "9" * 9 + "x1"):
        with pytest.raises(ValueError, match=r"no batch|at least one row"):
            parse_rows(bad)


def test_counts():
    work = Workload(rows=parse_rows("2x10+1x3/4"), **TINY)
    assert (work.num_pages, work.num_tokens, work.max_q_len) == (5, 5, 3)
    assert work.num_bytes == 4 * 16 * (2 * 2 * 24 + 2 * 4 * 5)
    assert work.num_flops == 4 * 16 * 4 * (10 + 10 + 2 + 3 + 4)


def test_tolerance_is_that_of_the_coarsest_dtype_that_a_kernel_multiplies_in():
    def tolerance(dtype, page_dtype=None):
        given = TINY | dict(dtype=dtype, page_dtype=page_dtype)
        return Workload(rows=((1, 9),), **given).tolerance

    assert tolerance("float16") == tolerance("float16", "float8_e4m3fn") < tolerance("bfloat16")
    assert tolerance("float16", "int8") == tolerance("bfloat16")
    assert tolerance("float32", "int8") == tolerance("float32") < tolerance("float16")


def test_tables_take_turns():
    work = Workload(rows=parse_rows("2x20+1x3/9"), **TINY)
    inputs = measure.make_inputs(work, turns=3, multiple=16)
    assert inputs.tables.shape == (3, 3, 16)
    held = inputs.tables[inputs.tables < inputs.k_pages.shape[0]]
    assert sorted(held.tolist()) == list(range(inputs.k_pages.shape[0]))
    first = inputs.tables[:, 0, 0].tolist()

    def first_page(q, x, tables):
        return q * 0 + tables[0, 0]

    def odd_one_out(q, x, tables):
        return jnp.where(tables[0, 0] == first[1], jnp.nan, q)

    assert measure.compile_loop(first_page, inputs, 5)()[0, 0, 0] == first[4 % 3]
    spread = measure.compile_loop(odd_one_out, inputs, 3)()  # (the second call of three)
    assert math.isnan(measure.error(spread, inputs.q))


@pytest.mark.parametrize("rows", ["1x16", "1x40000"])
def test_an_answer_to_fewer_tokens_is_wrong_in_rows_of_any_length(rows):
    """By the coarsest dtype's tolerance; what that rounds is not."""
    coarse = Workload(rows=parse_rows(rows), **TINY | dict(dtype="bfloat16"))
    work = dataclasses.replace(coarse, dtype="float32")
    inputs = measure.make_inputs(work, turns=1)
    right = measure.right_answer(work, inputs, 1)
    assert measure.error(right.astype(jnp.bfloat16), right) < coarse.tolerance / 2
    less = dataclasses.replace(inputs, kv_lens=inputs.kv_lens * 7 // 8)
    assert measure.error(measure.right_answer(work, less, 1), right) > coarse.tolerance


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_tuning_times_candidates_and_the_op_uses_what_it_wrote(kv_dtype, table, monkeypatch, capfd):
    """The whole way, by the command line, with the reference and a real clock."""
    every = cut.candidates
    few = lambda default, *, short: list(every(default, short=short))[:1]  # noqa: E731
    monkeypatch.setattr(cut, "candidates", few)
    options = ("2x20", "--heads", "4/2", "--head-dim", "16", "--page-size", "8")
    options += () if kv_dtype is None else ("--kv-dtype", kv_dtype)
    code, out, err = in_process("bench", *options, "--tune", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0, err
    for word in ("reference.short", "short_block_kv=64", "chosen", "(heuristic)", "tuned:"):
        assert word in out
    (entry,) = tuning.read(table)
    key = {"dtype": "float32", "heads": 2, "head_dim": 16, "page_size": 8, "rows": 2}
    assert entry.key == (key if kv_dtype is None else key | {"page_dtype": kv_dtype})
    assert entry.measured["jax"] == jax.__version__
    assert entry.measured["rows"] == ["2x20"]
    work = Workload(rows=parse_rows("2x20"), **TINY, page_dtype=kv_dtype)
    (question,) = tune.questions_of(work)
    assert question.entry(question.default).place == entry.place
    assert entry.config["short_block_kv"] in {c.short_block_kv for c in question.candidates}
    code, out, err = in_process("doctor", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0, err
    assert "reference.short" in out
    assert ("page_dtype=int8" in out) == (kv_dtype == "int8")
    assert str(table) in out


@pytest.mark.parametrize(
    ("rows", "asking"),
    [
        ("2x64", {"decode"}),
        ("1x512/512", {"prefill"}),  # (the decode kernel is there, and has no row)
        ("1x512/512+2x64", {"decode", "prefill"}),
    ],
)
@pytest.mark.parametrize(("device", "kind"), [("NVIDIA H200", ""), ("NVIDIA B200", "portable_")])
def test_kernels_are_tuned_that_have_rows_to_serve(rows, asking, device, kind):
    if kind and jax.__version_info__ < (0, 11):
        pytest.skip("the portable kernels need jax 0.11")
    shape = dict(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16, dtype="bfloat16")
    work = Workload(rows=parse_rows(rows), **shape)
    with building_for(device):
        questions = tune.questions_of(work, "mosaic_gpu")
    assert {question.kernel for question in questions} == {f"mosaic_gpu.{kind}{x}" for x in asking}


def test_where_nothing_can_be_tuned_nothing_is_written(table, monkeypatch, capfd):
    monkeypatch.setattr(tune, "questions_of", lambda work, implementation: [])
    args = ("bench", "2x20", "--heads", "4/2", "--head-dim", "16", "--tune")
    code, out, err = in_process(*args, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0, err
    assert "nothing to tune" in out
    assert not table.exists()


def test_a_wrong_kernel_is_not_chosen(monkeypatch):
    """A kernel of two configs, of which one doubles; it need be no attention for that."""

    def op_of(work, implementation=None):
        def op(q, x, tables):
            default, other = cut.Config(), cut.Config(block_q=1)
            picked = tuning.pick(
                "double", device="cpu", key={}, default=default, candidates=[other]
            )
            return q * picked.block_q

        return op

    monkeypatch.setattr(measure, "op_of", op_of)
    work = Workload(rows=parse_rows("1x9"), **TINY)
    with tuning.use([]):
        entries, trials = tune.tune([work], implementation="double", repeats=1)
    assert [(t.config.block_q, t.failure[:5], t.chosen) for t in trials] == [
        (32, "", True),
        (1, "wrong", False),
    ]
    assert [entry.config for entry in entries] == [{"block_q": 32}]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--heads", "5/2"), "--heads 5/2: write 32/8"),
        (("4x",), "'4x' is no batch"),
        (("1x8", "--implementation", "magic"), "unknown implementation 'magic'"),
        (("1x8", "--implementation", "mosaic_gpu"), "cannot serve this on cpu"),
    ],
)
def test_bad_input_gets_one_line(args, message, monkeypatch, capfd):
    code, out, err = in_process("bench", *args, monkeypatch=monkeypatch, capfd=capfd)
    assert code != 0
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("heads", ["4/2", "3/3"])
def test_heads_in_pairs_as_on_a_tpu(heads, monkeypatch, capfd):
    monkeypatch.setattr(measure, "heads_in_a_row", lambda head_dim: 2)
    args = ("bench", "2x20", "--heads", heads, "--head-dim", "64", "--kv-dtype", "int8")
    code, out, err = in_process(*args, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0, err
    assert "reference" in out


def test_a_damaged_table_gets_one_line(tmp_path, monkeypatch, capfd):
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"entries": 3}))
    code, _, err = in_process(
        "bench", "1x8", "--table", str(bad), monkeypatch=monkeypatch, capfd=capfd
    )
    assert code == 1
    assert f"{bad} is not a table" in err
    assert err.count("\n") == 1
