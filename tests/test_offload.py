"""Requests whose pages wait in the host's memory say what they would have said."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import test_serving as serving

from paxattn.decode_step import Status
from paxattn.serving import HostPages, pays_from

PAGES = 9


def offloading(state, tokens):
    policy = dataclasses.replace(state.policy, offload_from=jnp.int32(tokens))
    return dataclasses.replace(state, policy=policy)


def run_blocks(state, asked, host, num_pages):
    """Run requests in blocks, with the host's part between them; how many times pages came back."""
    for i, one in enumerate(asked):
        requests = serving.engine._put(state.requests, np.int32(i), one.request(state, i))
        state = dataclasses.replace(state, requests=requests)
    returns = 0
    while np.any(np.asarray(state.requests.status) == Status.RUNNING):
        away = np.asarray(state.away)
        state = host.between_blocks(state, scrub=False)
        serving.checked(state, num_pages)
        owners, lens = np.asarray(state.owners).tolist(), state.pool.table.kv_lens
        for place in np.flatnonzero((away > 0) & (np.asarray(state.away) == 0)).tolist():
            assert lens[owners.index(place)] == away[place]  # nothing is to be computed again
            returns += 1
        state = serving.engine._serve(serving.MODEL, state, np.int32(5), **serving.PLAIN)
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
    assert 0 < returns == host.moved <= int(state.preemptions)
    # Nothing below the bound moves, and all above it does.
    assert (host.moved == int(state.preemptions)) == (tokens == 1)


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


@pytest.mark.slow
def test_where_moving_pays_is_measured():
    state = serving.init_serve(serving.MODEL, **serving.SIZES)
    assert pays_from(serving.MODEL, state) >= 1
