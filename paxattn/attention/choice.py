"""Which implementation serves: the list of them, the target, and the choice with its reasons.

An implementation is a name, a check that raises NotImplementedError with the reason when it cannot
serve a request on a target, and two functions: one divides the work of a step's batch, the other
runs a layer of it. By default the native one of the target is tried first and the reference last; a
target with an accelerator that ends up on the reference is told why, once per reason. A native one
that was not checked on a kind of device yet may ask not to be its default (`hold_back`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from paxattn.attention import reference
from paxattn.attention.checks import Request
from paxattn.attention.mosaic_gpu import support as mosaic_gpu
from paxattn.attention.mosaic_tpu import support as mosaic_tpu
from paxattn.target import Target, target_of

Names = str | Sequence[str] | None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `paged_attention` would run, and why.

    Attributes:
        implementation: the chosen one's name; None if none of those asked for can serve.
        target: what the code would be built for.
        reasons: (name, reason) for every implementation considered, in the order tried.
    """

    implementation: str | None
    target: Target
    reasons: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.implementation or 'nothing'} on {self.target.device_kind}"]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to run the op.

    Attributes:
        name: what `implementation=` calls it.
        check: given a request (None: any) and a target, says why it can serve, or raises
            NotImplementedError saying why not.
        schedule: works out what is the same for all layers of a step, a pytree.
        run: runs it; arguments as `paged_attention_reference` has them, and `plan`, what
            `schedule` has worked out.
        hold_back: of what `check` accepts, says why it should only be served to who asks for it by
            name, or "".
    """

    name: str
    check: Callable[[Request | None, Target], str]
    schedule: Callable[..., Any]
    run: Callable[..., tuple[jax.Array, jax.Array]]
    hold_back: Callable[[Request | None, Target], str] = lambda request, target: ""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AttentionSchedule:
    """Which implementation serves a step's attention, and how its work is divided.

    Attributes:
        plan: the implementation's own.
        implementation: its name.
        request: what is static about the calls it is for.
        fixed_split: as in `paged_attention`: not None if a row's result must be its own matter.
    """

    plan: Any
    implementation: str = field(metadata=dict(static=True))
    request: Request = field(metadata=dict(static=True))
    fixed_split: int | None = field(metadata=dict(static=True))


def _check_reference(request: Request | None, target: Target) -> str:
    del request, target
    return "plain jax.numpy, serves everything on any platform"


def _schedule_reference(request: Request, target: Target, **batch: Any) -> None:
    """Nothing: the reference finds its way as it goes."""


def _run_reference(*args: Any, plan: None, sliding_window: Any, **options: Any) -> Any:
    window = np.int32(0) if sliding_window is None else sliding_window  # (one compilation)
    return reference.run(*args, sliding_window=window, **options)


_IMPLEMENTATIONS = {
    i.name: i
    for i in (
        Implementation(
            name="mosaic_gpu",
            check=mosaic_gpu.check,
            schedule=mosaic_gpu.schedule,
            run=mosaic_gpu.run,
            hold_back=mosaic_gpu.hold_back,
        ),
        Implementation(
            name="mosaic_tpu",
            check=mosaic_tpu.check,
            schedule=mosaic_tpu.schedule,
            run=mosaic_tpu.run,
        ),
        Implementation(
            name="reference",
            check=_check_reference,
            schedule=_schedule_reference,
            run=_run_reference,
        ),
    )
}
_NATIVE = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
_warned: set[str] = set()


def implementations() -> list[tuple[str, str, str]]:
    """Lists what this machine has, for `paxattn doctor`.

    Returns:
        (name, whether it serves on the default device, the reason). "first": it is tried before the
        others; "yes": it can serve, where those before it cannot or where it is asked for; "no".
    """
    target, out = target_of(None), []
    first = consider(None, target, None).implementation
    for name, implementation in _IMPLEMENTATIONS.items():
        try:
            reason = implementation.check(None, target)
        except NotImplementedError as error:
            out.append((name, "no", str(error)))
            continue
        held_back = implementation.hold_back(None, target)
        reason = "; ".join(filter(None, (reason, held_back)))
        out.append((name, "first" if name == first else "yes", reason))
    return out


def in_order(implementation: Names, target: Target) -> tuple[str, ...]:
    """The implementations to try.

    Args:
        implementation: as in `paged_attention`.
        target: what for.

    Returns:
        Their names; asked for by these, none is held back.

    Raises:
        ValueError: an unknown name.
    """
    if implementation is None:
        native = _NATIVE.get(target.platform)
        return ("reference",) if native is None else (native, "reference")
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    known = ", ".join(sorted(_IMPLEMENTATIONS))
    if not names:
        raise ValueError(f"{implementation=} names nothing: choose from {known}, or pass None")
    for name in names:
        if name not in _IMPLEMENTATIONS:
            raise ValueError(f"unknown implementation {name!r}: choose from {known}, or pass None")
    return names


def consider(request: Request | None, target: Target, implementation: Names) -> Explanation:
    """Asks implementations in turn until one can serve.

    Args:
        request: what is asked; None: anything at all.
        target: what for.
        implementation: as in `paged_attention`.

    Returns:
        The choice and every reason.

    Raises:
        ValueError: an unknown name.
    """
    reasons: list[tuple[str, str]] = []
    for name in in_order(implementation, target):
        tried = _IMPLEMENTATIONS[name]
        try:
            reason = tried.check(request, target)
        except NotImplementedError as error:
            reasons.append((name, str(error)))
            continue
        held_back = tried.hold_back(request, target) if implementation is None else ""
        reasons.append((name, held_back or reason))
        if not held_back:
            return Explanation(implementation=name, target=target, reasons=tuple(reasons))
    return Explanation(implementation=None, target=target, reasons=tuple(reasons))


def schedule(
    request: Request, q: Any, implementation: Names, *, fixed_split: int | None, **batch: Any
) -> AttentionSchedule:
    """Finds the implementation that serves and has it divide a batch's work.

    Warns (once per reason) of a slow fallback.

    Args:
        request: what is asked.
        q: tells the target.
        implementation: as in `paged_attention`.
        fixed_split: as in `paged_attention`.
        **batch: `block_tables`, `kv_lens`, `cu_q_lens` and `sliding_window`, as there.

    Returns:
        The schedule.

    Raises:
        NotImplementedError: nothing that was asked for can serve.
        ValueError: an unknown name.
    """
    made = consider(request, target_of(q), implementation)
    if made.implementation is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in made.reasons)
        raise NotImplementedError(
            f"{implementation=} cannot serve this on {made.target.device_kind}: {reasons}"
        )
    if implementation is None and len(made.reasons) > 1:
        name, reason = made.reasons[0]
        message = (
            f"paged_attention falls back to the slower reference on {made.target.device_kind}: "
            f"{name}: {reason} (implementation='reference' asks for it without this warning)"
        )
        if message not in _warned:
            _warned.add(message)
            warnings.warn(message, stacklevel=3)
    divide = _IMPLEMENTATIONS[made.implementation].schedule
    return AttentionSchedule(
        plan=divide(request, made.target, fixed_split=fixed_split, **batch),
        implementation=made.implementation,
        request=_of_step(request),
        fixed_split=fixed_split,
    )


def _of_step(request: Request) -> Request:
    """What of a request a schedule depends on; layers may differ in the rest."""
    return dataclasses.replace(
        request, num_layers=None, soft_cap=False, sinks=False, return_lse=False
    )


def check_schedule(
    schedule: AttentionSchedule, request: Request, implementation: Names, target: Target
) -> None:
    """Checks that a schedule is for such a call.

    Args:
        schedule: from `schedule`.
        request: what is asked.
        implementation: as in `paged_attention`.
        target: what for.

    Raises:
        ValueError: it is for another; says in what they differ.
    """
    wanted = _of_step(request)
    for item in dataclasses.fields(Request):
        made, now = getattr(schedule.request, item.name), getattr(wanted, item.name)
        if made != now:
            raise ValueError(
                f"the schedule was made for {item.name}={made}, this call has {now}: make it with "
                "attention_schedule and the same arguments"
            )
    if implementation is not None and schedule.implementation not in in_order(
        implementation, target
    ):
        raise ValueError(
            f"the schedule was made for implementation={schedule.implementation!r}, this call asks "
            f"for {implementation!r}: pass the same to both"
        )


def run(schedule: AttentionSchedule, *args: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Runs the implementation that a schedule is for.

    Args:
        schedule: from `schedule`.
        *args: q, k_pages and v_pages.
        **options: the implementation's other arguments.

    Returns:
        o and lse.
    """
    implementation = _IMPLEMENTATIONS[schedule.implementation]
    return implementation.run(*args, plan=schedule.plan, **options)
