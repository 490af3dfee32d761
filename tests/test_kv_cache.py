"""The cache: slots, drops, copies, scrubbing, sizes, and that nothing copies the pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxattn import kv_cache, page_table
from paxattn.kv_cache import KVCache, init_kv_cache
from paxattn.page_table import PageCopies

L, N, H, P, D = 2, 6, 3, 4, 8
T = 5


def i32(values):
    return jnp.asarray(list(values), jnp.int32)


def filled(value=0.0):
    cache = init_kv_cache(
        num_layers=L, num_pages=N, page_size=P, num_kv_heads=H, head_dim=D, dtype=jnp.float32
    )
    return KVCache(k_pages=cache.k_pages + value, v_pages=cache.v_pages - value)


def new_tokens(seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=(T, H, D)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize("branch", ["default", "tpu"])
def test_write_puts_tokens_at_their_slots_and_nowhere_else(branch, monkeypatch):
    """In either of its forms, whatever this machine is."""
    monkeypatch.setattr(
        kv_cache.lax, "platform_dependent", lambda *args, **branches: branches[branch](*args)
    )
    k, v = new_tokens()
    slots = jnp.array([1, N * P, 23, -1, 8], jnp.int32)
    write = jax.jit(lambda *args: kv_cache.write(*args))
    cache = write(filled(7.0), jnp.int32(1), slots, k, v)
    expected_k, expected_v = np.full((L, N, H, P, D), 7.0), np.full((L, N, H, P, D), -7.0)
    for token in (0, 2, 4):
        page, offset = divmod(int(slots[token]), P)
        expected_k[1, page, :, offset] = k[token]
        expected_v[1, page, :, offset] = v[token]
    np.testing.assert_array_equal(cache.k_pages, expected_k.astype(np.float32))
    np.testing.assert_array_equal(cache.v_pages, expected_v.astype(np.float32))


def test_numbers_out_of_range_write_nothing():
    """None of them wraps round: not the lowest slot, nor a layer or a slot of 64 bits."""
    k, v = new_tokens()
    slots = np.array([-(2**31), -1, 2**31 - 1, N * P, -N * P])
    write = jax.jit(kv_cache.write)
    wide = kv_cache.write(filled(), 0, slots + np.array([0, 0, 2**31, 2**32, -(2**32)]), k, v)
    for cache in (write(filled(), 0, i32(slots), k, v), wide):
        np.testing.assert_array_equal(cache.k_pages, filled().k_pages)
    for layer in (-1, L, -(2**31)):
        cache = write(filled(), jnp.int32(layer), i32(range(T)), k, v)
        np.testing.assert_array_equal(cache.v_pages, filled().v_pages)


@pytest.mark.parametrize(
    ("layer", "slots", "message"),
    [
        (-1, range(T), r"layer=-1 must be in \[0, 2\), the cache's layers"),
        (L, range(T), r"layer=2 must be in \[0, 2\), the cache's layers"),
        (0.0, range(T), "layer must be integers, got float32"),
        ([0, 1], range(T), r"layer has shape \(2,\), expected shape \(\)"),
        (0, [[s] for s in range(T)], r"slots has shape \(5, 1\), expected one axis"),
    ],
)
def test_write_refuses(layer, slots, message):
    with pytest.raises(ValueError, match=message):
        kv_cache.write(filled(), layer, i32(slots), *new_tokens())


def test_write_casts_and_names_wrong_shapes():
    k, v = new_tokens()
    half = init_kv_cache(
        num_layers=1, num_pages=2, page_size=P, num_kv_heads=H, head_dim=D, dtype=jnp.float16
    )
    slots = jnp.arange(T, dtype=jnp.int32)
    assert kv_cache.write(half, 0, slots, k, v).v_pages.dtype == jnp.float16
    with pytest.raises(ValueError, match=r"v.shape=\(5, 3, 7\) must be \(5, 3, 8\)"):
        kv_cache.write(half, 0, slots, k, v[..., :7])


def test_worked_example_of_the_docstring():
    table = page_table.init_page_table(num_pages=6, page_size=4, max_seqs=1, max_pages_per_seq=3)
    table = page_table.PageTable(
        block_tables=jnp.array([[2, 0, 6]], jnp.int32),
        kv_lens=jnp.array([6], jnp.int32),
        ref_counts=jnp.array([1, 0, 1, 0, 0, 0], jnp.int32),
        free_pages=jnp.array([1, 3, 4, 5, 5, 5], jnp.int32),
        num_free=jnp.int32(4),
        page_size=table.page_size,
    )
    page_table.check_invariants(table)
    assert page_table.slot_mapping(table, jnp.array([1], jnp.int32), 1).tolist() == [2]
    cache = jax.eval_shape(
        lambda: init_kv_cache(num_layers=2, num_pages=6, page_size=4, num_kv_heads=3, head_dim=8)
    )
    assert (cache.bytes_per_page, cache.bytes_per_token) == (768, 192)


def test_copy_pages_copies_the_first_count_in_all_layers():
    rng = np.random.default_rng(1)
    k = rng.normal(size=(L, N, H, P, D)).astype(np.float32)
    cache = KVCache(k_pages=jnp.asarray(k), v_pages=jnp.asarray(-k))
    copies = PageCopies(
        src=jnp.array([4, 2, 1], jnp.int32),
        dst=jnp.array([0, 3, 5], jnp.int32),
        count=jnp.int32(2),
    )
    out = jax.jit(kv_cache.copy_pages)(cache, copies)
    expected = k.copy()
    expected[:, 0], expected[:, 3] = k[:, 4], k[:, 2]
    np.testing.assert_array_equal(out.k_pages, expected)
    np.testing.assert_array_equal(out.v_pages, -expected)


def test_move_slots_reads_before_it_writes():
    rng = np.random.default_rng(2)
    k = rng.normal(size=(L, N, H, P, D)).astype(np.float32)
    cache = KVCache(k_pages=jnp.asarray(k), v_pages=jnp.asarray(-k))
    src = np.array([3, 4, 9, 23, 5, 0])
    dst = np.array([2, 3, 4, N * P, -1, N * P])  # a chain; the others go nowhere
    out = jax.jit(kv_cache.move_slots)(cache, i32(src), i32(dst))
    expected = np.moveaxis(k, 3, 2).reshape(L, N * P, H, D).copy()
    expected[:, dst[:3]] = expected[:, src[:3]]
    expected = np.moveaxis(expected.reshape(L, N, P, H, D), 2, 3)
    np.testing.assert_array_equal(out.k_pages, expected)
    np.testing.assert_array_equal(out.v_pages, -expected)
    with pytest.raises(ValueError, match=r"dst has shape \(2,\), expected shape \(3,\)"):
        kv_cache.move_slots(cache, i32([1, 2, 3]), i32([1, 2]))


def test_scrub_zeroes_what_a_release_gave_back():
    @jax.jit
    def tables():
        sizes = dict(num_pages=N, page_size=P, max_seqs=2, max_pages_per_seq=3)
        lens = jnp.array([5, 9], jnp.int32)
        table, ok, _ = page_table.reserve(
            page_table.init_page_table(**sizes), lens, max_new_pages=3
        )
        table, _ = page_table.append(table, lens)
        return table, ok, page_table.release(table, jnp.array([False, True]))

    table, ok, freed = tables()
    assert np.asarray(ok).all()
    own = set(np.asarray(table.block_tables)[1, :3].tolist())
    cache = jax.jit(kv_cache.scrub)(filled(3.0), freed.free_pages, table.num_free, freed.num_free)
    for page in range(N):
        expected = 0.0 if page in own else 3.0
        assert (np.asarray(cache.k_pages[:, page]) == expected).all()
        assert (np.asarray(cache.v_pages[:, page]) == -expected).all()


def test_scrub_skips_ids_out_of_range():
    cache = kv_cache.scrub(filled(3.0), jnp.array([-1, N, 2], jnp.int32), 0, 99)
    zeroed = [page for page in range(N) if not np.asarray(cache.k_pages[:, page]).any()]
    assert zeroed == [2]
    cache = kv_cache.scrub(filled(3.0), np.array([0, 1, 2]), -2, 1)  # nor does start wrap round
    zeroed = [page for page in range(N) if not np.asarray(cache.k_pages[:, page]).any()]
    assert zeroed == [0]
    assert kv_cache.scrub(cache, np.zeros(0, np.int32), 0, 9).k_pages is cache.k_pages


@pytest.mark.parametrize(
    "step",
    [
        lambda x: kv_cache.copy_pages(filled(), PageCopies(src=x, dst=x, count=x[0])),
        lambda x: kv_cache.scrub(filled(), x, 0, x[0]),
        lambda x: kv_cache.write(filled(), x[0], x, *new_tokens()),
    ],
    ids=["copy_pages", "scrub", "write"],
)
def test_a_cache_made_inside_shard_map(step):
    """It is the same on every device, until a step's data differ."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    run = jax.shard_map(
        lambda x: jax.tree.map(lambda leaf: leaf[None], step(x[0])),
        mesh=mesh, in_specs=spec, out_specs=spec,
    )  # fmt: skip
    out = jax.eval_shape(run, jax.ShapeDtypeStruct((1, T), jnp.int32))
    assert out.k_pages.shape == (1, L, N, H, P, D)


def before_jax(*version):
    return tuple(map(int, jax.__version__.split(".")[:2])) < version


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16, jnp.int8])
def test_donated_steps_change_the_pool_in_place(dtype):
    if dtype in (jnp.bfloat16, jnp.int8) and before_jax(0, 11) and jax.default_backend() == "cpu":
        pytest.skip("XLA's CPU backend of jax 0.10 widens bf16 scatters; see kv_cache.write")
    pool = jax.eval_shape(
        lambda: init_kv_cache(
            num_layers=4, num_pages=4096, page_size=16, num_kv_heads=2, head_dim=32, dtype=dtype
        )
    )
    pool_bytes = pool.bytes_per_page * pool.num_pages

    def step(cache, copies, slots, k, v):
        cache = kv_cache.copy_pages(cache, copies)

        def layer(cache, i):
            return kv_cache.write(cache, i, slots, k, v), None

        return jax.lax.scan(layer, cache, jnp.arange(4, dtype=jnp.int32))[0]

    ids = jax.ShapeDtypeStruct((T,), jnp.int32)
    copies = PageCopies(src=ids, dst=ids, count=jax.ShapeDtypeStruct((), jnp.int32))
    new = jax.ShapeDtypeStruct((T, 2, 32), dtype)
    compiled = jax.jit(step, donate_argnums=0).lower(pool, copies, ids, new, new).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 50


@pytest.mark.parametrize(
    "name", ["num_layers", "num_pages", "page_size", "num_kv_heads", "head_dim"]
)
@pytest.mark.parametrize("value", [0, -3, 2.0, True])
def test_sizes_must_be_positive_integers(name, value):
    sizes = {"num_layers": L, "num_pages": N, "page_size": P, "num_kv_heads": H, "head_dim": D}
    with pytest.raises(ValueError, match=f"{name}={value!r} must be an integer of at least 1"):
        init_kv_cache(**{**sizes, name: value})


def test_sizes_are_those_that_a_page_table_may_have():
    sizes = dict(num_layers=1, num_kv_heads=1, head_dim=1)
    cache = init_kv_cache(num_pages=np.int64(2), page_size=np.int32(3), **sizes)
    assert cache.k_pages.shape == (1, 2, 1, 3, 1)
    with pytest.raises(ValueError, match="page_size=257 must be between 1 and 256"):
        init_kv_cache(num_pages=2, page_size=257, **sizes)
    with pytest.raises(ValueError, match="num_pages=8388608 times page_size=256 is 2147483648 sl"):
        init_kv_cache(num_pages=2**23, page_size=256, **sizes)


@pytest.mark.parametrize("dtype", ["int32", "float64", "float8_e5m2"])
def test_dtype_must_be_one_that_attention_reads(dtype):
    with pytest.raises(ValueError, match=f"dtype={dtype} must be float32, bfloat16, .* or int8"):
        init_kv_cache(
            num_layers=L, num_pages=N, page_size=P, num_kv_heads=H, head_dim=D, dtype=dtype
        )
