"""The reference against a float64 oracle, and the properties that every implementation promises."""

import dataclasses
import math

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case
from jax.sharding import PartitionSpec

from paxattn.attention import cut, paged_attention, paged_attention_decode, walk
from paxattn.attention.reference import paged_attention_reference


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def run(inputs, **changes):
    """`(o, lse)` of the reference, in float64 for comparisons."""
    arrays = (jnp.asarray(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages))
    o, lse = paged_attention(
        *arrays, **(inputs.options | changes), implementation="reference", return_lse=True
    )
    assert o.dtype == inputs.q.dtype
    assert lse.dtype == jnp.float32
    return np.asarray(o, np.float64), np.asarray(lse, np.float64)


def same(got, want):
    """Bit for bit."""
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def check(inputs, got):
    """Against attention over what the pages hold; and, bounded, over what was quantised."""
    (o, lse), (want_o, want_lse) = got, cases.oracle(inputs)
    if inputs.exact is not None:
        apart = np.abs(o - cases.oracle(cases.exact(inputs))[0]).max()
        assert (
            apart <= cases.QUANTIZED[inputs.case.page_dtype][2] + cases.TOLERANCE[inputs.case.dtype]
        )
    tolerance = cases.TOLERANCE[inputs.case.dtype]
    np.testing.assert_allclose(o, want_o, atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    np.testing.assert_allclose(lse, want_lse, atol=cases.LSE_TOLERANCE, rtol=cases.LSE_TOLERANCE)
    blind = np.isneginf(want_lse)
    np.testing.assert_array_equal(o[blind], 0.0)  # exactly


@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_matches_oracle_and_ignores_poison(case):
    inputs = cases.make(case)
    got = run(inputs)
    check(inputs, got)
    for value in (np.nan, np.inf):
        same(run(cases.poison(inputs, value)), got)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*cases.full_grid(), *cases.quantized_grid()], ids=str)
def test_whole_grid(case):
    inputs = cases.make(case)
    got = run(inputs)
    check(inputs, got)
    same(run(cases.poison(inputs)), got)


DECODE = Case(q_lens=(1,) * 4, kv_lens=(70, 33, 200, 0), page_size=8, heads=(4, 2), head_dim=16)
RAGGED = Case(
    q_lens=(1, 40, 0, 12), kv_lens=(90, 40, 0, 130), page_size=8, heads=(4, 2), head_dim=16,
    padding=3, max_q_len=40,
)  # fmt: skip


def test_decode_form_equals_ragged_form():
    inputs = cases.make(DECODE)
    options = {k: v for k, v in inputs.options.items() if k not in ("cu_q_lens", "max_q_len")}
    del options["causal"]
    arrays = (jnp.asarray(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages))
    o, lse = paged_attention_decode(*arrays, **options, return_lse=True)
    want_o, want_lse = run(inputs, max_q_len=1)
    np.testing.assert_array_equal(np.asarray(o), want_o)
    np.testing.assert_array_equal(np.asarray(lse), want_lse)
    check(inputs, (np.asarray(o), np.asarray(lse)))


def test_single_tokens_without_a_bound_on_q_lens():
    inputs = cases.make(dataclasses.replace(DECODE, padding=20))  # the driver for long rows
    check(inputs, run(inputs))


@pytest.mark.parametrize("case", [DECODE, RAGGED], ids=["decode", "ragged"])
def test_a_row_does_not_depend_on_the_others(case):
    """Bit for bit, whatever the other rows' lengths and contents, within the same shapes."""
    inputs = cases.make(case)
    o, lse = run(inputs)
    empty = np.asarray(case.kv_lens) * np.asarray([1, 0, 1, 1], np.int32)
    other = dataclasses.replace(inputs, kv_lens=np.where(empty == 200, 3, empty).astype(np.int32))
    changed_o, changed_lse = run(other)
    for row in (0, 3):
        tokens = slice(*inputs.cu_q_lens[row : row + 2])
        np.testing.assert_array_equal(o[tokens], changed_o[tokens])
        np.testing.assert_array_equal(lse[tokens], changed_lse[tokens])


def test_rows_may_share_pages():
    inputs = cases.make(DECODE)
    tables = inputs.block_tables.copy()
    tables[1, :5] = tables[0, :5]  # 33 tokens of row 0's pages
    check(inputs := dataclasses.replace(inputs, block_tables=tables), run(inputs))


def test_a_missing_page_is_hidden_not_replaced():
    """A sentinel (or any number that is no page) where tokens should be must leak nobody's KV."""
    inputs = cases.make(dataclasses.replace(DECODE, kv_lens=(16, 16, 16, 16)))
    num_pages = len(inputs.owned)
    want = run(dataclasses.replace(inputs, kv_lens=np.full(4, 8, np.int32)))
    for hole in (num_pages, -1, num_pages + 7, 2**31 - 1):
        tables = inputs.block_tables.copy()
        tables[:, 1] = hole
        got = run(dataclasses.replace(inputs, block_tables=tables))
        np.testing.assert_allclose(got[0], want[0], atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_more_queries_than_tokens(causal):
    """Such as of many rows that share a short prefix, which all of them see."""
    case = dataclasses.replace(RAGGED, q_lens=(200, 3), kv_lens=(64, 3), causal=causal)
    inputs = cases.make(dataclasses.replace(case, max_q_len=200))
    check(inputs, run(inputs))


def test_a_missing_page_far_behind_the_queries_is_hidden():
    """Where blocks are read whole, without masks."""
    inputs = cases.make(dataclasses.replace(RAGGED, q_lens=(12,), kv_lens=(300,)))
    without = np.delete(inputs.block_tables, 20, axis=1)
    without = np.pad(without, ((0, 0), (0, 1)), constant_values=len(inputs.owned))
    less = inputs.kv_lens - np.int32(8)
    want = cases.oracle(dataclasses.replace(inputs, block_tables=without, kv_lens=less))
    for hole in (len(inputs.owned), -1):
        tables = inputs.block_tables.copy()
        tables[:, 20] = hole
        got = run(dataclasses.replace(inputs, block_tables=tables))
        np.testing.assert_allclose(got[0], want[0], atol=1e-5)


@pytest.mark.parametrize("case", [DECODE, RAGGED], ids=["decode", "ragged"])
@pytest.mark.parametrize("window", [1, 9, 0, -3])
def test_traced_window(case, window):
    """A window may be data; what is not positive means none. One compilation serves all."""
    inputs = cases.make(case)
    got = run(inputs, sliding_window=jnp.int32(window))
    want = dataclasses.replace(inputs.case, window=window if window > 0 else None)
    check(dataclasses.replace(inputs, case=want), got)


@pytest.mark.parametrize("max_q_len", [8, None])
@pytest.mark.parametrize("window", [2**31 - 1, 2**30])
def test_the_widest_windows_see_all(window, max_q_len):
    """Also from before a sequence's start, where positions are negative."""
    case = Case(
        q_lens=(7, 3, 1, 9)[: 3 if max_q_len else 4], kv_lens=(5, 1, 0, 7)[: 3 if max_q_len else 4],
        heads=(4, 2), head_dim=16, page_size=8, window=window, max_q_len=max_q_len,
    )  # fmt: skip
    check(inputs := cases.make(case), run(inputs))


def test_rows_with_more_queries_than_promised_get_nobody_elses():
    inputs = cases.make(dataclasses.replace(DECODE, q_lens=(3, 1, 1, 0), max_q_len=2))
    o, lse = run(inputs)
    want_o, want_lse = cases.oracle(inputs)
    want_o[2], want_lse[2] = 0.0, -np.inf
    np.testing.assert_allclose(o, want_o, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


@pytest.mark.parametrize("garbage", [2**31 - 1, -(2**31), -5])
def test_lengths_that_no_row_can_have(garbage):
    """More tokens than a row's pages hold (or less than none) end, and leave other rows alone."""
    inputs = cases.make(DECODE)
    lens = inputs.kv_lens * [1, 1, 0, 1] + [0, 0, garbage, 0]
    want, full = run(inputs), inputs.block_tables.shape[1] * DECODE.page_size
    o, lse = run(dataclasses.replace(inputs, kv_lens=lens.astype(np.int32)))
    same((o[:2], lse[:2]), (want[0][:2], want[1][:2]))
    as_full = dataclasses.replace(inputs, kv_lens=np.where(lens == garbage, full, lens))
    if garbage > 0:
        same((o, lse), run(dataclasses.replace(as_full, kv_lens=as_full.kv_lens.astype(np.int32))))
    else:
        assert (o[2] == 0).all()


@pytest.mark.parametrize("sinks", [(-np.inf, 0.5), (np.inf, 0.5)], ids=["none", "all"])
def test_infinite_sinks(sinks):
    """A sink of -inf is no sink; one of +inf takes everything. Neither makes a NaN."""
    inputs = cases.make(dataclasses.replace(DECODE, heads=(2, 1), sinks=True))
    inputs = dataclasses.replace(inputs, sinks=np.asarray(sinks, np.float32))
    o, lse = run(inputs)
    if sinks[0] < 0:
        check(inputs, (o, lse))
    else:
        assert (o[:, 0] == 0).all()
        np.testing.assert_array_equal(lse[:, 0], [np.inf] * 3 + [-np.inf])
    options = {k: v for k, v in inputs.options.items() if k != "sinks"}
    pages = jnp.asarray(inputs.k_pages), jnp.asarray(inputs.v_pages)
    loss = lambda q, sinks: paged_attention(q, *pages, **options, sinks=sinks).sum()  # noqa: E731
    for grad in jax.grad(loss, argnums=(0, 1))(jnp.asarray(inputs.q), jnp.asarray(inputs.sinks)):
        assert np.isfinite(grad).all()


# Work follows what is stored.


@pytest.fixture(scope="module")
def count_blocks():
    """Calls the reference, and counts the blocks of pages that its loops walk, as they run."""
    walked, page_ids = [], walk._page_ids

    def counting(tile, logical):
        jax.debug.callback(walked.append, logical[0, 0])
        return page_ids(tile, logical)

    def call(q, pages, tables, lens, cu, window, max_q_len):
        return paged_attention_reference.__wrapped__(
            q, pages, pages, block_tables=tables, kv_lens=lens, cu_q_lens=cu,
            layer=0, sm_scale=1.0, sliding_window=window, sinks=None, max_q_len=max_q_len,
            causal=True, soft_cap=None,
            config=cut.Config(short_block_kv=32, block_kv=32, block_q=16),
        )  # fmt: skip

    jitted = jax.jit(call, static_argnames="max_q_len")
    pages = jnp.zeros((1, 200, 1, 8, 8))
    tables = jnp.arange(200, dtype=jnp.int32).reshape(2, 100)

    def count(q_lens, kv_lens, window):
        max_q_len = 1 if max(q_lens) <= 1 else 33
        walked.clear()
        jitted(
            jnp.zeros((2 if max_q_len == 1 else 33, 2, 8)), pages, tables,
            jnp.asarray(kv_lens, jnp.int32), jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32),
            jnp.int32(window), max_q_len=max_q_len,
        )[0].block_until_ready()  # fmt: skip
        jax.effects_barrier()
        return len(walked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "_page_ids", counting)
        yield count


@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "window", "blocks"),
    [
        ((1, 1), (70, 33), 0, 3),  # the longest row: ceil(70 / 32)
        ((1, 1), (70, 33), 20, 1),  # only what the window sees: from page 50 // 8 on
        ((1, 1), (0, 0), 0, 0),
        ((0, 1), (70, 33), 0, 2),  # a row without queries costs nothing
        ((32, 1), (32, 33), 0, 2 + 1 + 1),  # the single-token row; two causal tiles
        ((32, 0), (96, 0), 0, 3 + 3),  # tiles end at tokens 80 and 96
        ((32, 0), (96, 0), 16, 1 + 1),  # and start at pages 49 // 8 and 65 // 8
        ((1, 1), (800, 3), 0, 25),
        ((0, 0), (800, 3), 0, 0),
    ],
)
def test_work_follows_the_longest_live_row(count_blocks, q_lens, kv_lens, window, blocks):
    assert count_blocks(q_lens, kv_lens, window) == blocks


def avals(jaxpr):
    """Every value's shape in a jaxpr, inner ones included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for param in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from avals(inner)


def test_memory_does_not_follow_the_table_or_the_pool():
    rows, heads, dim, page, layers, tokens = 8, 2, 16, 16, 2, 64

    def build(max_pages, num_pages, max_q_len):
        i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
        pages = jax.ShapeDtypeStruct((layers, num_pages, heads, page, dim), jnp.float32)
        q = jax.ShapeDtypeStruct((tokens, heads, dim), jnp.float32)

        def f(q, k, v, tables, lens, cu, layer):
            return paged_attention(
                q, k, v, block_tables=tables, kv_lens=lens, cu_q_lens=cu, layer=layer,
                max_q_len=max_q_len,
            )  # fmt: skip

        return f, (q, pages, pages, i32(rows, max_pages), i32(rows), i32(rows + 1), i32())

    for max_q_len in (1, 64):
        f, args = build(4096, 16_000, max_q_len)
        shapes = [a.shape for a in avals(jax.make_jaxpr(f)(*args).jaxpr)]
        largest = max(math.prod(shape) for shape in shapes if shape[:2] != (layers, 16_000))
        assert largest < tokens * 4096 * page / 8  # nothing is [tokens, max context]

    small, large = (
        jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
        for f, args in (build(256, 1000, 1), build(4096, 16_000, 1))
    )
    assert large - small < 8 * 4096 * rows  # at most the table itself, once or twice
    assert large < 16_000 * heads * page * dim * 4 / 4  # no layer of the pool is copied


# Large pools.


def test_many_pages():
    inputs = cases.make(dataclasses.replace(DECODE, page_size=1, head_dim=8, heads=(1, 1)))
    far = cases.scatter(inputs)
    check(far, run(far))


@pytest.mark.slow
def test_offsets_beyond_int32():
    """A pool of more than 2**31 numbers (4.3 GB): its last pages must be reachable."""
    num_pages, heads, page, dim = 2**20 + 64, 2, 8, 128
    assert num_pages * heads * page * dim > 2**31
    rng = np.random.default_rng(0)
    pages = np.zeros((num_pages, heads, page, dim), np.float16)
    pages[-64:] = rng.standard_normal((64, heads, page, dim), np.float32)
    near, far = jnp.asarray(pages[-64:]), jnp.asarray(pages)
    del pages
    table = rng.permutation(64).astype(np.int32)[None]
    q = jnp.asarray(rng.standard_normal((1, 4, dim), np.float32), jnp.float16)
    lens = jnp.asarray([64 * page - 3], jnp.int32)
    want = paged_attention_decode(q, near, near, block_tables=table, kv_lens=lens)
    got = paged_attention_decode(
        q, far, far, block_tables=table + np.int32(num_pages - 64), kv_lens=lens
    )
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


# Composition.


@pytest.mark.parametrize("case", [DECODE, RAGGED], ids=["decode", "ragged"])
def test_scan_over_layers_with_their_own_windows(case):
    inputs = cases.make(dataclasses.replace(case, layers=3))
    options = {k: v for k, v in inputs.options.items() if k not in ("layer", "sliding_window")}
    windows = jnp.asarray([0, 5, 40], jnp.int32)

    @jax.jit
    def all_layers(q, k, v):
        def body(carry, x):
            layer, window = x
            o = paged_attention(q, k, v, layer=layer, sliding_window=window, **options)
            return carry, o

        return jax.lax.scan(body, 0, (jnp.arange(3), windows))[1]

    got = all_layers(inputs.q, inputs.k_pages, inputs.v_pages)
    for layer, window in enumerate((None, 5, 40)):
        one = dataclasses.replace(
            inputs,
            case=dataclasses.replace(case, window=window),
            k_pages=inputs.k_pages[layer],
            v_pages=inputs.v_pages[layer],
        )
        np.testing.assert_allclose(got[layer], cases.oracle(one)[0], atol=1e-5)


@pytest.mark.parametrize("case", [DECODE, RAGGED], ids=["decode", "ragged"])
def test_vmap(case):
    """Over queries, pages and tables at once: data-dependent loops become masked ones."""
    many = [cases.make(case, seed) for seed in range(3)]
    stack = lambda name: jnp.stack([jnp.asarray(getattr(x, name)) for x in many])  # noqa: E731

    def f(q, k, v, tables, lens):
        return paged_attention(
            q, k, v, block_tables=tables, kv_lens=lens, cu_q_lens=jnp.asarray(many[0].cu_q_lens),
            max_q_len=case.max_q_len,
        )  # fmt: skip

    names = ("q", "k_pages", "v_pages", "block_tables", "kv_lens")
    got = jax.jit(jax.vmap(f))(*map(stack, names))
    for inputs, o in zip(many, got, strict=True):
        np.testing.assert_allclose(o, cases.oracle(inputs)[0], atol=1e-5)


@pytest.mark.parametrize("case", [DECODE, RAGGED], ids=["decode", "ragged"])
def test_shard_map_over_heads(case):
    """Types (`check_vma`) are settled while tracing, so nothing needs to run."""
    inputs = cases.make(dataclasses.replace(case, sinks=True))
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, options = PartitionSpec(None, "heads"), inputs.options

    def f(q, k, v, sinks):
        return paged_attention(q, k, v, **options | dict(sinks=sinks))

    sharded = jax.shard_map(
        f, mesh=mesh, in_specs=(heads, heads, heads, PartitionSpec("heads")), out_specs=heads
    )
    args = inputs.q, inputs.k_pages, inputs.v_pages, inputs.sinks
    out, grads = jax.eval_shape(
        jax.value_and_grad(lambda *args: sharded(*args).sum(), argnums=(0, 1, 2, 3)), *args
    )
    assert [g.shape for g in grads] == [x.shape for x in args]
    assert out.shape == ()


@pytest.mark.parametrize("case", [DECODE, RAGGED], ids=["decode", "ragged"])
def test_a_mesh_with_explicit_axes(case):
    """What `jax.make_mesh` makes by default; shardings are part of types there."""
    inputs = cases.make(dataclasses.replace(case, sinks=True))
    mesh = jax.sharding.AbstractMesh((2,), ("m",), axis_types=(jax.sharding.AxisType.Explicit,))
    heads = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "m"))

    def f(q, k, v):
        o, lse = paged_attention(q, k, v, return_lse=True, **inputs.options)
        return o.sum() + lse.sum(), (o, lse)

    args = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=heads)
        for x in (inputs.q, inputs.k_pages, inputs.v_pages)
    )
    with jax.sharding.use_abstract_mesh(mesh):
        (_, out), grads = jax.eval_shape(jax.value_and_grad(f, (0, 1, 2), has_aux=True), *args)
    assert [tuple(x.sharding.spec) for x in out] == [(None, "m", None), (None, "m")]
    assert all(x.sharding.spec[1] == "m" for x in grads)


@pytest.mark.parametrize("case", [DECODE, RAGGED], ids=["decode", "ragged"])
def test_64_bit_numbers_enabled(case):
    """Nothing is promoted to them, also not in strict mode, while tracing."""
    inputs = cases.make(dataclasses.replace(case, sinks=True, window=7))
    arrays = inputs.q, inputs.k_pages, inputs.v_pages

    def f(q, k, v):
        return paged_attention(q, k, v, **inputs.options).sum()

    with jax.enable_x64(True):
        grads = jax.eval_shape(jax.grad(f, (0, 1, 2)), *arrays)
    assert [g.dtype for g in grads] == [x.dtype for x in arrays]


def test_the_pool_is_updated_in_place_around_attention():
    """Writing and reading in turn, layer after layer and step after step, copies no pool."""
    pool = jax.ShapeDtypeStruct((4, 500, 2, 16, 32), jnp.float32)
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    rows = 8

    def steps(q, k, v, tables, lens):
        def layer(carry, i):
            q, k, v = carry
            page = tables[:, 0]
            k, v = (x.at[i, page, :, 3].set(q, mode="drop") for x in (k, v))
            o = paged_attention_decode(q, k, v, block_tables=tables, kv_lens=lens, layer=i)
            return (q + o, k, v), None

        body = lambda _, carry: jax.lax.scan(layer, carry, jnp.arange(4))[0]  # noqa: E731
        return jax.lax.fori_loop(0, 3, body, (q, k, v))

    q = jax.ShapeDtypeStruct((rows, 2, 32), jnp.float32)
    args = q, pool, pool, i32(rows, 20), i32(rows)
    compiled = jax.jit(steps, donate_argnums=(1, 2)).lower(*args).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * pool.size * 4
    assert memory.temp_size_in_bytes < pool.size * 4 / 4


# Gradients.


def numeric(inputs, weights, direction, epsilon=1e-4):
    """The oracle's directional derivative of `sum(o * w) + sum(lse * u)`, in float64."""

    def loss(sign):
        moved = dataclasses.replace(
            inputs, **{k: getattr(inputs, k) + sign * epsilon * d for k, d in direction.items()}
        )
        o, lse = cases.oracle(moved)
        return (o * weights[0]).sum() + (np.where(np.isneginf(lse), 0, lse) * weights[1]).sum()

    return (loss(1) - loss(-1)) / (2 * epsilon)


@pytest.mark.parametrize(
    "case",
    [
        dataclasses.replace(DECODE, sinks=True, soft_cap=2.0, window=30, max_q_len=1),
        dataclasses.replace(RAGGED, sinks=True, soft_cap=2.0, layers=2, window=50),
        dataclasses.replace(DECODE, causal=False, max_q_len=1),
    ],
    ids=["decode", "ragged", "not-causal"],
)
def test_gradients(case):
    inputs = cases.make(case)
    tables = inputs.block_tables.copy()
    tables[1, :2] = tables[0, :2]  # shared pages gather both rows' gradients
    inputs = dataclasses.replace(inputs, block_tables=tables)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(inputs.q.shape), rng.standard_normal(inputs.q.shape[:2])
    names = ["q", "k_pages", "v_pages"] + ["sinks"] * case.sinks
    options = {k: v for k, v in inputs.options.items() if k not in names}

    dead = np.isneginf(cases.oracle(inputs)[1])

    @jax.jit
    def gradients(arrays):
        call = lambda arrays: paged_attention(**arrays, **options, return_lse=True)  # noqa: E731
        # What sees nothing is constant: any cotangent of it is ignored, NaN included.
        w = jnp.where(dead[..., None], jnp.nan, jnp.asarray(weights[0], jnp.float32))
        u = jnp.where(dead, jnp.nan, jnp.asarray(weights[1], jnp.float32))
        return jax.vjp(call, arrays)[1]((w, u))[0]

    grads = gradients({k: jnp.asarray(getattr(inputs, k)) for k in names})
    for name in names:
        for _ in range(3):
            direction = {name: rng.standard_normal(grads[name].shape)}
            want = numeric(inputs, weights, direction)
            got = (np.asarray(grads[name], np.float64) * direction[name]).sum()
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)

    poisoned = cases.poison(inputs)
    again = gradients({k: jnp.asarray(getattr(poisoned, k)) for k in names})
    same([again[name] for name in names], [grads[name] for name in names])
    unowned = np.broadcast_to(~inputs.owned[:, None, :, None], inputs.k_pages.shape)
    for name in ("k_pages", "v_pages"):
        np.testing.assert_array_equal(np.asarray(grads[name])[unowned], 0.0)


@pytest.mark.variants
def test_gradients_of_16_bit_pages_and_vmap():
    inputs = cases.make(dataclasses.replace(DECODE, dtype="bfloat16"))
    options = inputs.options

    def loss(q, k, v):
        return paged_attention(q, k, v, **options).astype(jnp.float32).sum()

    arrays = [jnp.asarray(x) for x in (inputs.q, inputs.k_pages, inputs.v_pages)]
    one = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)
    many = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(0, None, None)))(
        jnp.stack([arrays[0]] * 2), *arrays[1:]
    )
    for a, b, x in zip(one, many, arrays, strict=True):
        assert a.dtype == x.dtype
        np.testing.assert_allclose(
            np.asarray(b[1], np.float32), np.asarray(a, np.float32), atol=1e-2, rtol=1e-2
        )
