"""One workload, by this library and by every peer: a row for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from gpu_sections.context import Context, host_error
from paxattn.attention import measure
from paxattn.attention.measure import Inputs, Workload

# time(work, inputs) -> seconds per call, largest error
Timer = Callable[[Workload, Inputs], tuple[float, float]]
REPEATS = 7


def compare(
    context: Context,
    case: dict,
    work: Workload,
    make: Callable[[], Inputs],
    peers: Mapping[str, Timer],
    figures: Callable[[Workload, float], dict],
) -> None:
    """Emits a row for each, ours first.

    Args:
        context: of the section.
        case: the first columns.
        work: the workload.
        make: makes its arrays, if there is time.
        peers: by name.
        figures: what to make of the seconds.
    """
    made: list[Inputs] = []

    def row(timer: Timer, ours: float | None) -> dict:
        made[:] = made or [make()]
        seconds, error = timer(work, made[0])
        us = seconds * 1e6
        over = 1.0 if ours is None else us / ours
        return {"us": us, **figures(work, seconds), "time over ours": over, "relative error": error}

    own = partial(row, partial(_ours, context), None)
    if found := context.attempt(case | {"attention": "paxattn"}, own):
        for name, timer in peers.items():
            context.attempt(case | {"attention": name}, partial(row, timer, found["us"]))


def _ours(context: Context, work: Workload, inputs: Inputs) -> tuple[float, float]:
    return time_op(measure.op_of(work, context.implementation), work, inputs, inputs)


def time_op(op: measure.Op, work: Workload, inputs: Inputs, plain: Inputs) -> tuple[float, float]:
    """Times an op in JAX on `inputs`; `plain` are the same as `make_inputs` made them."""
    steps = measure.steps_for(work)
    run = measure.compile_loop(op, inputs, steps)
    error = host_error(work, plain, steps, run())
    return measure.take_turns({0: run}, steps=steps, repeats=REPEATS)[0], error
