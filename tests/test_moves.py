"""Where a server's state goes: to a file and another process, or its pages to the host's memory."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_serving as serving
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from paxattn.decode_step import Status
from paxattn.models import Decoder
from paxattn.serving import Engine, HostPages, Policy, SnapshotError, offload, pays_from, placing

PAGES = 9
TOKENIZER = Tokenizer(WordLevel({f"w{i:03}": i for i in range(serving.V)}, unk_token="w000"))
ASKED = serving.workload(50, priorities=2)


def new_engine():
    return serving.new_engine(PAGES, tokenizer=TOKENIZER)


def ask(engine):
    for i, one in enumerate(ASKED):
        stop = [f"w{i:03} w0"] if i % 2 else None  # never met, but its beginnings are held back
        engine.add_request(one.prompt, stop=stop, **serving.options_of(one))


def put_together(deltas):
    """Tokens, log-probabilities, text and end of each request."""
    found = {}
    for delta in deltas:
        tokens, logprobs, text, _ = found.get(delta.index, ([], [], "", None))
        found[delta.index] = (
            tokens + delta.tokens,
            logprobs + delta.logprobs,
            text + delta.text,
            delta.finish_reason,
        )
    return found


def assert_same(found, expected):
    for i, (tokens, logprobs, text, reason) in expected.items():
        assert (found[i][0], found[i][2:]) == (tokens, (text, reason))
        np.testing.assert_allclose(found[i][1], logprobs, atol=1e-5)


def run_until_one_has_ended(engine):
    news = []
    while not any(delta.finish_reason for delta in news):
        news += engine.step()
    return news


def run_out(engine):
    news = []
    while engine.num_unfinished:
        news += engine.step()
    return news


@pytest.fixture(scope="module")
def undisturbed():
    engine = new_engine()
    ask(engine)
    found = put_together(run_out(engine))
    expected = serving.alone(ASKED)
    assert [found[i][0] for i in range(len(ASKED))] == [one.tokens for one in expected]
    return found


def test_another_engine_goes_on(undisturbed, tmp_path):
    engine = new_engine()
    ask(engine)
    told = run_until_one_has_ended(engine)
    aborted = max(
        {*range(len(ASKED))} - {delta.index for delta in told if delta.finish_reason},
        key=lambda i: len(undisturbed[i][0]),
    )
    told = [delta for delta in told if delta.index != aborted]
    engine.abort(aborted)
    path = tmp_path / "state"
    engine.save(path)
    expected = run_out(engine)
    assert next(delta for delta in expected if delta.index == aborted).finish_reason == "abort"

    other = new_engine()
    before = other.restore(path)
    assert other.state.pool.cache.k_pages.committed  # as pages that come back are
    # What was told before is told again, of those that had not ended, in one piece each.
    ended = {delta.index for delta in told if delta.finish_reason}
    assert put_together([delta for delta in before if delta.tokens]) == put_together(
        [delta for delta in told if delta.index not in ended]
    )
    # Of those who wait nothing was, and they are named all the same.
    assert [delta.index for delta in before] == sorted({*range(len(ASKED))} - ended - {aborted})
    assert put_together(run_out(other)) == put_together(expected)
    assert serving.checked(other._state, PAGES) == 0
    found = put_together([*told, *expected])
    assert_same(found, {i: one for i, one in undisturbed.items() if i != aborted})
    other.add_request([1], max_new_tokens=1)
    with pytest.raises(RuntimeError, match="1 requests are not finished"):
        other.restore(path)


def serve_until_killed(path):
    """What the other process does."""
    engine = new_engine()
    ask(engine)
    told = run_until_one_has_ended(engine)
    engine.save(path)
    print(json.dumps([dataclasses.asdict(delta) for delta in told]), flush=True)
    while True:
        engine.step()


def another_process(call, **environment):
    """One that calls a function of this file."""
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here)])
    return subprocess.Popen(
        [sys.executable, "-c", f"import test_moves; test_moves.{call}"],
        cwd=here,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def killed(call):
    """What another process has told in its first line, before it was killed."""
    with another_process(call) as process:
        line = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return [serving.engine.Delta(**fields) for fields in json.loads(line)]


@pytest.mark.slow
def test_a_server_that_was_killed_goes_on_in_another_process(undisturbed, tmp_path):
    path = tmp_path / "state"
    told = killed(f"serve_until_killed({str(path)!r})")
    engine = new_engine()
    assert engine.restore(path)
    assert_same(put_together(told + run_out(engine)), undisturbed)
    assert serving.checked(engine._state, PAGES) == 0


KINDS = [one for seed in (60, 61, 62) for one in serving.workload(seed, priorities=2)]


def feed(engine, numbers):
    """Send requests, each kind in turn, and step when the queue is full; the news."""
    news = []
    for i in numbers:
        one = KINDS[i % len(KINDS)]
        while True:
            try:
                assert engine.add_request(one.prompt, **serving.options_of(one)) == i
                break
            except serving.QueueFull:
                news += engine.step()
    return news


def feed_until_killed(path, count):
    """What the other process does."""
    engine = new_engine()
    told = feed(engine, range(count))
    engine.save(path)
    print(json.dumps([dataclasses.asdict(delta) for delta in told]), flush=True)
    while True:
        engine.step()


@pytest.mark.slow
def test_ten_thousand_requests_and_a_kill(tmp_path):
    half = 5000
    path = tmp_path / "state"
    told = killed(f"feed_until_killed({str(path)!r}, {half})")
    engine = new_engine()
    engine.restore(path)
    found = put_together([*told, *feed(engine, range(half, 2 * half)), *run_out(engine)])
    assert sorted(found) == list(range(2 * half))
    expected = [one for i in range(0, len(KINDS), 12) for one in serving.alone(KINDS[i : i + 12])]
    for i, (tokens, _, _, reason) in found.items():
        one = expected[i % len(expected)]
        assert (tokens, reason) == (one.tokens, one.finish_reason)
    assert serving.checked(engine._state, PAGES) == 0
    assert int(engine._state.preemptions) > half
    assert int(engine._state.use.cached_tokens) > 2 * half


def test_files_that_do_not_fit_are_refused(tmp_path):
    engine = Engine(serving.MODEL, **serving.SIZES)
    path = tmp_path / "state"
    engine.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    sizes = serving.SIZES | {"num_pages": 8, "max_requests": 5}
    others = [
        (serving.MODEL, sizes, "num_pages=32 there, 8 here; max_requests=12 there, 5 here"),
        (serving.MODEL, serving.SIZES | {"prefix_cache": False}, "prefix_cache=True there"),
        (Decoder(serving.CONFIG, rngs=nnx.Rngs(9)), serving.SIZES, "weights=[0-9a-f]{8} there"),
    ]
    for model, sizes, message in others:
        with pytest.raises(SnapshotError, match=message):
            Engine(model, **sizes).restore(path)
    whole = path.read_bytes()
    for content, message in (
        (b"", "missing or damaged"),
        (whole[:-1], "missing or damaged"),
        (whole[:100], "missing or damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(SnapshotError, match=message):
            engine.restore(path)
    for place in (b'"next_index', b".pool.table", None):  # a bit of what the host says, of an array
        at = len(whole) - 9 if place is None else whole.index(place) + len(place) + 4
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SnapshotError, match=r"damaged|saved"):
            engine.restore(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(SnapshotError, match="not the state of a server"):
        engine.restore(path)
    with pytest.raises(SnapshotError, match="nowhere: missing"):
        engine.restore(tmp_path / "nowhere")
    path.write_bytes(whole)  # what was refused has left the engine as it was
    assert engine.restore(path) == []
    with pytest.raises(FileNotFoundError, match="nowhere"):
        engine.save(tmp_path / "nowhere" / "state")


@pytest.mark.variants
def test_small_floats_are_saved_bit_by_bit(tmp_path):
    model = Decoder(serving.CONFIG, rngs=nnx.Rngs(0), dtype="bfloat16")
    engine, other = (Engine(model, **serving.SIZES) for _ in range(2))
    pool = engine._state.pool
    values = np.arange(pool.cache.k_pages.size).reshape(pool.cache.k_pages.shape)
    cache = jax.tree.map(lambda x: jnp.asarray(values, x.dtype), pool.cache)
    held = np.arange(serving.PAGES) % 3 == 1
    table = dataclasses.replace(pool.table, ref_counts=held.astype(np.int32))
    pool = dataclasses.replace(pool, cache=cache, table=table)
    engine._state = dataclasses.replace(engine._state, pool=pool)
    engine.save(tmp_path / "state")
    other.restore(tmp_path / "state")
    found = np.asarray(other._state.pool.cache.k_pages)
    assert found.dtype == "bfloat16"
    np.testing.assert_array_equal(found[:, held], np.asarray(cache.k_pages)[:, held])
    assert not found[:, ~held].any()
    assert jax.tree.structure(other._state) == jax.tree.structure(engine._state)


# Pages in the host's memory.


def offloading(state, tokens):
    policy = dataclasses.replace(state.policy, offload_from=jnp.int32(tokens))
    return placing.settled(dataclasses.replace(state, policy=policy), serving.MODEL)


def run_blocks(state, asked, host, num_pages, model=serving.MODEL, arrivals=None):
    """Run requests in blocks, with the host's part between them; the tokens of all that came back.

    Each request comes before the block that `arrivals` says, by default the first.
    """
    left = list(zip(arrivals or [0] * len(asked), range(len(asked)), asked, strict=True))
    returns, blocks = [], 0
    while left or np.any(np.asarray(state.requests.status) == Status.RUNNING):
        while left and left[0][0] <= blocks:
            _, i, one = left.pop(0)
            requests = serving.engine._put(state.requests, np.int32(i), one.request(state, i))
            state = dataclasses.replace(state, requests=requests)
        blocks += 1
        away = np.asarray(state.away)
        state = host.between_blocks(state, scrub=False)
        serving.checked(state, num_pages)
        owners, lens = np.asarray(state.owners).tolist(), state.pool.table.kv_lens
        for place in np.flatnonzero((away > 0) & (np.asarray(state.away) == 0)).tolist():
            assert lens[owners.index(place)] == away[place]  # nothing is to be computed again
            returns.append(int(away[place]))
        state = serving.engine._serve(model, state, np.int32(5), **serving.PLAIN)
        assert int(state.use.num_steps) < 2000
    assert serving.checked(state, num_pages) == 0
    assert not state.away.any()
    return state, returns


@pytest.mark.parametrize(
    ("remember", "tokens"), [(True, 1), (True, 10), pytest.param(False, 1, marks=pytest.mark.slow)]
)
def test_outputs_are_the_same_when_pages_move(remember, tokens):
    asked = serving.workload(70, priorities=3)
    host = HostPages()
    state = offloading(serving.new_state(PAGES, 6, remember=remember), tokens)
    state, returns = run_blocks(state, asked, host, PAGES)
    serving.assert_same(state, serving.alone(asked))
    assert 0 < len(returns) == host.moved <= int(state.preemptions)
    # Nothing below the bound moves, and all above it does.
    assert (host.moved == int(state.preemptions)) == (tokens == 1)


@pytest.mark.parametrize("kind", ["pinned_host", "none like it"])
def test_pages_lie_in_the_memory_of_the_host_meanwhile(monkeypatch, kind):
    monkeypatch.setattr(offload, "_HOST", kind)
    pages = jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 3, 4)
    there = offload.to_host(pages)
    if kind == "pinned_host":
        assert there.sharding.memory_kind == kind
    else:
        assert isinstance(there, np.ndarray)
    back = offload.to_device(there, pages)
    assert back.sharding == pages.sharding
    np.testing.assert_array_equal(np.asarray(back), np.asarray(pages))


@pytest.mark.parametrize("which", ["away", "leaving"])
def test_a_request_that_is_aborted_on_its_way_leaves_nothing(which):
    asked = serving.workload(70, priorities=3)
    engine = serving.new_engine(PAGES)
    engine._state = offloading(engine._state, 1)
    for one in asked:
        engine.add_request(one.prompt, **serving.options_of(one))
    found = {i: [] for i in range(len(asked))}

    def gone():
        """The place of a request on its way; the requests' places are their numbers here."""
        away, owners = np.asarray(engine._state.away), np.asarray(engine._state.owners)
        places = np.flatnonzero(away) if which == "away" else owners[engine._state.leaving :][:1]
        return places[0] if places.size else None

    while (aborted := gone()) is None:
        for delta in engine.step():
            found[delta.index] += delta.tokens
    assert engine.abort(aborted)
    for delta in engine.drain():
        found[delta.index] += delta.tokens
    for i, one in enumerate(serving.alone(asked)):
        assert found[i] == (one.tokens if i != aborted else one.tokens[: len(found[i])])
    assert not engine._host_pages._pages
    assert serving.checked(engine._state, PAGES) == 0


def test_the_policy_and_the_figures_are_those_of_the_engine_that_goes_on(tmp_path):
    engine = new_engine()
    ask(engine)
    run_until_one_has_ended(engine)
    engine.save(tmp_path / "state")
    other = new_engine()
    policy = jax.tree.map(jnp.int32, Policy(token_budget=7, watermark=1, offload_from=4))
    other._state = placing.settled(dataclasses.replace(other.state, policy=policy), serving.MODEL)
    ran = []
    other._pace.took = lambda storing, steps, seconds: ran.append(steps)
    assert other.restore(tmp_path / "state")
    assert jax.tree.leaves(other.state.policy) == [7, 1, 4]
    before, stats = int(other.state.use.num_steps), other.stats
    assert before > 5
    assert (stats.num_steps, stats.preemptions, stats.looked_up_tokens) == (0, 0, 0)
    while other.num_unfinished:
        other.step()
        assert 0 < ran[-1] <= 5
    assert sum(ran) == other.stats.num_steps == int(other.state.use.num_steps) - before
    assert other._host_pages.moved > 0  # as its own policy says


@pytest.mark.slow
def test_where_moving_pays_is_measured():
    state = serving.init_serve(serving.MODEL, **serving.SIZES)
    assert pays_from(serving.MODEL, state) >= 1


# On a mesh.

SIZES = {"max_seqs": 3, "max_requests": 8, "max_tokens": 32, "step_tokens": 8}


def engine_on_two_devices():
    """A model split over two devices by its heads, in an engine that moves pages to the host."""
    model = Decoder(
        dataclasses.replace(serving.CONFIG, num_kv_heads=2), rngs=nnx.Rngs(0), stacked=True
    )
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    for name, kernel in model.kernels.items():
        spec = jax.P(None, "heads") if name == "qkv" else jax.P(None, None, "heads")
        kernel.set_value(jax.device_put(kernel[...], jax.NamedSharding(mesh, spec)))
    return Engine(model, num_pages=12, page_size=4, steps_per_read=4, offload_from=1, **SIZES)


def count_compilations(path):
    """What a process with two devices does: what is compiled for one workload, three times."""
    compiled, ours = [], {"serve", "put", "stop", "take_out", "to_bring_back", "bring_back"}

    def listen(event, _, fun_name="", **more):
        name = fun_name.removeprefix("jit(").removesuffix(")")
        if event.endswith("backend_compile_duration") and name in ours:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    engine, options = engine_on_two_devices(), {"max_new_tokens": 16}
    assert engine.state.pool.cache.k_pages.sharding.spec[2] == "heads"
    found = []
    for _ in range(3):
        for i in range(6):
            engine.add_request(list(range(1, 10 + i)), priority=i, **options)
        told = put_together(engine.drain())
        found.append([told[i][0] for i in sorted(told)])
        engine.abort(engine.add_request([1], **options))
        engine.drain()
        assert sorted(compiled) == sorted(ours)
        engine.save(path)
        engine.restore(path)
    alone = [engine.generate([list(range(1, 10 + i))], **options)[0].tokens for i in range(6)]
    assert found == [alone] * 3
    assert engine._host_pages.moved > 2
    assert sorted(compiled) == sorted(ours)


@pytest.mark.slow
def test_on_a_mesh_nothing_is_compiled_anew_when_pages_moved_or_a_file_was_read(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    call = f"count_compilations({str(tmp_path / 'state')!r})"
    with another_process(call, XLA_FLAGS=flags) as process:
        assert process.wait() == 0
