"""Pages that every layer's sliding window has left behind return to the pool, in every loop."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import test_moves as moves
import test_serving as serving
from flax import nnx

from paxattn import KeptPool, generate
from paxattn.models import Decoder
from paxattn.ngram import NGram
from paxattn.sampling import SamplingParams
from paxattn.serving.offload import HostPages
from paxattn.speculative import DraftModel
from paxattn.step import window_of

WINDOW, P = 7, serving.P
CONFIG = dataclasses.replace(serving.CONFIG, max_positions=64, windows=(WINDOW,))
MODEL = Decoder(CONFIG, rngs=nnx.Rngs(1))
MOST = (WINDOW - 1) // P + 2  # pages that so many tokens, and one more, can lie in

PROMPTS = [[5, 6, 7], list(range(100, 109))]
PARAMS = [SamplingParams(temperature=2.0, seed=i) for i in range(2)]


@pytest.mark.parametrize(
    ("windows", "widest"), [((), None), ((3, 7), 7), ((7, 0), None), ((0, 0), None)]
)
def test_only_models_whose_layers_all_have_windows_leave_pages_behind(windows, widest):
    assert window_of(SimpleNamespace(config=SimpleNamespace(windows=windows))) == widest
    assert window_of(SimpleNamespace()) is None


def draft_model():
    return DraftModel(model=Decoder(CONFIG, rngs=nnx.Rngs(2)), num_tokens=3)


@pytest.mark.parametrize(
    ("options", "num_pages"),
    [
        ({"sampling": PARAMS}, 8),
        # Guesses need room beyond the window, and beams of a prompt pages of their own.
        pytest.param({"sampling": PARAMS, "num_samples": 3}, 20, marks=pytest.mark.slow),
        pytest.param({"draft": NGram(num_tokens=3)}, 11, marks=pytest.mark.slow),
        pytest.param({"draft": draft_model}, 11, marks=pytest.mark.slow),
        pytest.param({"num_beams": 3}, 24, marks=pytest.mark.slow),
    ],
)
@pytest.mark.variants
def test_generate_goes_on_in_the_pages_of_a_window(options, num_pages):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    sizes = {"page_size": P, "max_new_tokens": 40, **options}
    found = generate(MODEL, PROMPTS, num_pages=num_pages, **sizes)
    # A pool that remembers keeps everything.
    whole = generate(
        MODEL, PROMPTS, prefix_cache=KeptPool(MODEL, num_pages=99, page_size=P), **sizes
    )
    assert [one.tokens for one in found.completions] == [one.tokens for one in whole.completions]
    assert {one.finish_reason for one in found.completions} == {"length"}
    assert found.stats.peak_pages <= num_pages < whole.stats.peak_pages
    assert found.stats.utilization > whole.stats.utilization


def kept_few(state):
    """Check that rows hold no more than the window's pages; poison what is free."""
    blocks, lens = jax.device_get((state.pool.table.block_tables, state.pool.table.kv_lens))
    assert ((blocks < serving.PAGES).sum(axis=1) <= MOST).all()
    first = np.maximum(lens + 1 - WINDOW, 0) // P
    for row, start, end in zip(blocks, first, -(-lens // P), strict=True):
        assert (row[start:end] < serving.PAGES).all()
    return serving.poisoned(state)


def check_workload(seed, num_pages, budget, remember=True):
    asked = serving.workload(seed)
    expected = serving.alone(asked, MODEL)
    state = serving.new_state(num_pages, budget, remember=remember, model=MODEL)
    arrivals = [2 * i for i in range(len(asked))]
    state, preempted = serving.run(
        state, asked, arrivals, num_pages=num_pages, look=kept_few, model=MODEL
    )
    serving.assert_same(state, expected)
    return state, preempted


@pytest.mark.variants
def test_a_server_gives_back_what_windows_left_behind():
    # The longest request fills eight pages, were they all kept.
    state, preempted = check_workload(20, 6, 5)
    assert preempted
    assert int(state.use.cached_tokens) > 0


def test_what_fits_while_it_runs_can_come_back():
    """In three pages, a step of eight tokens needs five: they are stored fewer at a time."""
    _, preempted = check_workload(41, MOST, 8)
    assert preempted
    served = serving.Engine(MODEL, **{**serving.SIZES, "num_pages": MOST})
    assert served.longest == serving.LONGEST
    served = serving.Engine(MODEL, **{**serving.SIZES, "num_pages": MOST - 1})
    assert served.longest == (MOST - 1) * P + 1


def test_pages_that_come_back_are_those_that_the_window_sees():
    """Here are four pages; the first has passed through more when others, more urgent, come."""
    first, *others = serving.workload(42)
    first = dataclasses.replace(first, prompt=list(range(50, 66)))
    asked = [first, *(dataclasses.replace(one, priority=1) for one in others)]
    state = moves.offloading(serving.new_state(4, 8, model=MODEL), 1)
    arrivals, host = [0] + [2] * len(others), HostPages()
    state, returns = moves.run_blocks(state, asked, host, 4, MODEL, arrivals)
    serving.assert_same(state, serving.alone(asked, MODEL))
    assert len(returns) == host.moved == int(state.preemptions)
    assert max(returns) > 4 * P


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(21, 41))
def test_many_workloads(seed):
    check_workload(seed, [5, 6, 8, 12][seed % 4], 4 + seed % 5, remember=seed % 3 > 0)
