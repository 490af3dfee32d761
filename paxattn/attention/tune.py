"""Finds the fastest config of each kernel that a list of workloads uses on this machine.

Every candidate is built through the public op, checked against the reference and timed, all in
turns. A config is chosen for a key (see `tuning`), so one that several workloads share is judged by
all of them: by the geometric mean of its times over the heuristic's.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from paxattn.attention import measure, tuning
from paxattn.attention.choice import Names
from paxattn.attention.measure import Workload
from paxattn.attention.tuning import Entry, Question

# A config is preferred to the heuristic's when it takes at most this much of its time.
_WORTH = 0.98


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one candidate.

    Attributes:
        question: what the kernel asked.
        config: the candidate.
        over_default: its time over the heuristic's, geometric mean over workloads; None if it
            failed.
        failure: why it cannot serve, or "".
        chosen: whether it is the one that goes into the table.
    """

    question: Question
    config: Any
    over_default: float | None
    failure: str
    chosen: bool


def tune(
    works: Sequence[Workload],
    *,
    implementation: str | Sequence[str],
    repeats: int = 7,
    version: str = "",
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[Entry], list[Trial]]:
    """Tries all candidates of all kernels that workloads use.

    Args:
        works: the workloads.
        implementation: as in `paged_attention`, by name: what tables do not know yet is held back
            from those who do not ask for it.
        repeats: timings of each candidate.
        version: of the package, for the entries.
        report: told in a few words what is being done.

    Returns:
        The entries for a table, and what became of every candidate, fastest first.

    Raises:
        RuntimeError: not even the heuristic's config gives right results.
    """
    users: dict[tuple, tuple[Question, list[Workload]]] = {}
    for work in works:
        for question in questions_of(work, implementation):
            _, sharing = users.setdefault(question.entry(question.default).place, (question, []))
            sharing.append(work)
    entries, trials = [], []
    for question, sharing in users.values():
        ratios: dict[Any, list[float]] = {config: [] for config in question.candidates}
        failures: dict[Any, str] = {}
        for i, work in enumerate(sharing, 1):
            report(f"{question.kernel}, workload {i} of {len(sharing)}")
            left = [config for config in ratios if config not in failures]
            seconds, failed = _time(work, question, left, implementation, repeats)
            if question.default in failed:
                raise RuntimeError(f"{question.kernel}: {failed[question.default]}")
            failures |= failed
            for config, taken in seconds.items():
                ratios[config].append(taken / seconds[question.default])
        means = {
            config: math.exp(math.fsum(map(math.log, found)) / len(found))
            for config, found in ratios.items()
            if config not in failures
        }
        best = min(means, key=lambda config: means[config])
        if means[best] > _WORTH:
            best = question.default
        entries.append(_entry(question, best, means[best], sharing, version))
        trials += [
            Trial(
                question=question,
                config=config,
                over_default=means.get(config),
                failure=failures.get(config, ""),
                chosen=config == best,
            )
            for config in sorted(ratios, key=lambda config: means.get(config, math.inf))
        ]
    return entries, trials


def questions_of(work: Workload, implementation: Names = None) -> list[Question]:
    """What the kernels that serve a workload's rows ask, found by tracing: nothing runs."""
    inputs = jax.eval_shape(lambda: measure.make_inputs(work, turns=1))
    op = measure.op_of(work, implementation)
    with tuning.listen() as questions:
        jax.eval_shape(lambda x: op(x.q, x, x.tables[0]), inputs)
    # (A kernel that is there for shorter rows than these would run, and have nothing to do.)
    least = min(new for new, _ in work.rows)
    found = {
        question.entry(question.default).place: question
        for question in questions
        if question.max_q_len is None or question.max_q_len >= least
    }
    return list(found.values())


def _time(
    work: Workload,
    question: Question,
    configs: Sequence[Any],
    implementation: str | Sequence[str],
    repeats: int,
) -> tuple[dict[Any, float], dict[Any, str]]:
    """Seconds per call of the configs that work, and why the others do not."""
    inputs, steps = measure.make_inputs(work), measure.steps_for(work)
    right = measure.right_answer(work, inputs, steps)
    runs: dict[Any, Callable[[], Any]] = {}
    failures: dict[Any, str] = {}
    for config in configs:
        with tuning.use([question.entry(config)]):
            try:
                op = measure.op_of(work, implementation)
                run = measure.compile_loop(op, inputs, steps)
                error = measure.error(run(), right)
                if error <= work.tolerance:
                    runs[config] = run
                else:
                    failures[config] = f"wrong: an error of {error:.2g}"
            except Exception as failure:  # whatever a compiler raises: the others go on
                failures[config] = f"{type(failure).__name__}: {str(failure).strip()[:200]}"
    return measure.take_turns(runs, steps=steps, repeats=repeats), failures


def _entry(
    question: Question, config: Any, ratio: float, works: Sequence[Workload], version: str
) -> Entry:
    return question.entry(
        config,
        over_heuristic=round(ratio, 4),
        heuristic=dataclasses.asdict(question.default),
        rows=[_short(work.rows) for work in works],
        paxattn=version,
        jax=jax.__version__,
        date=datetime.date.today().isoformat(),
    )


def _short(rows: Sequence[tuple[int, int]]) -> str:
    """Rows as `measure.parse_rows` reads them."""
    counts = {row: rows.count(row) for row in rows}
    return "+".join(
        f"{count}x{stored}" if new == 1 else f"{count}x{new}/{stored}"
        for (new, stored), count in counts.items()
    )
