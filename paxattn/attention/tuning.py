"""Tuned block sizes: what was measured to be the fastest config, per kind of device, as data.

A kernel has a heuristic for its config and a list of candidates that it can be built with. At trace
time it asks `pick`, which returns the candidate that a table holds for this device and these static
facts (the *key*), or the heuristic's choice. Keys hold no facts of a single batch, so that a
sequence's result does not depend on what else is in the batch.

There are two tables, JSON files of one form: `tuned.json` beside this file, which comes with the
package, and the user's (`user_table`), which `paxattn bench --tune` writes and which goes first:

    {"entries": [{"device": "NVIDIA H200", "kernel": "mosaic_gpu.decode",
                  "key": {"dtype": "bfloat16", "head_dim": 128, "page_size": 16, "rows": 8},
                  "config": {"block_kv": 64, "stages": 4, "num_cores": 264},
                  "measured": {...}}]}

With quantised pages the key has their `page_dtype`, too. `measured` says when, with which versions,
and how fast; nothing reads it but people. Since only what gave the reference's results is written,
an entry also tells that its kernel works on that kind of device (`measured_on`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")
PACKAGE_TABLE = Path(__file__).parent / "tuned.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of a table.

    Attributes:
        device: the device's kind, as JAX names it.
        kernel: which kernel.
        key: static facts of a call that the choice depends on.
        config: fields of the kernel's config.
        measured: how it was found.
    """

    device: str
    kernel: str
    key: Mapping[str, Any]
    config: Mapping[str, Any]
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, str, str]:
        """What at most one entry of a table may have."""
        return self.device, self.kernel, json.dumps(self.key, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a kernel asked `pick`.

    Attributes:
        device: the device's kind.
        kernel: which kernel.
        key: static facts.
        default: the heuristic's config.
        candidates: the configs that the kernel can be built with, the default among them.
        max_q_len: the kernel's rows have at most so many new tokens; None: any number.
    """

    device: str
    kernel: str
    key: Mapping[str, Any]
    default: Any
    candidates: tuple[Any, ...]
    max_q_len: int | None = None

    def entry(self, config: Any, **measured: Any) -> Entry:
        """The entry that answers with `config`: its fields that differ between candidates count."""
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        varied = {
            name: value
            for name, value in values.items()
            if any(getattr(other, name) != value for other in self.candidates)
        }
        return Entry(
            device=self.device, kernel=self.kernel, key=self.key, config=varied, measured=measured
        )


def user_table() -> Path:
    """Where the user's table lies (or would)."""
    import platformdirs  # (here, so that attention alone needs jax alone)

    return Path(platformdirs.user_data_dir("paxattn")) / "tuned.json"


def read(path: Path) -> tuple[Entry, ...]:
    """Reads a table.

    Args:
        path: the file; none: no entries.

    Returns:
        Its entries.

    Raises:
        ValueError: it is not a table; says what is wrong with it.
    """
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _read(path: Path, mtime: int, size: int) -> tuple[Entry, ...]:
    del mtime, size  # (the file again, if it has changed)
    try:
        entries = tuple(Entry(**line) for line in json.loads(path.read_text())["entries"])
        for entry in entries:
            if not isinstance(entry.key, dict) or not isinstance(entry.config, dict):
                raise TypeError("an entry's key and config must be objects")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a table of tuned configs ({type(error).__name__}: {error}): name "
            "another, or delete it if it was one, and `paxattn bench --tune` writes it anew"
        ) from None
    return entries


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Adds entries to a table, in place of those that it has for the same.

    Args:
        path: the file; made if there is none.
        entries: the new ones.

    Raises:
        ValueError: the file is there, and is not a table.
    """
    merged = {entry.place: entry for entry in (*read(path), *entries)}
    lines = [dataclasses.asdict(merged[place]) for place in sorted(merged)]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")  # (a reader sees the old or the new one)
    beside.write_text(json.dumps({"entries": lines}, indent=1) + "\n")
    os.replace(beside, path)


_given: ContextVar[tuple[Entry, ...] | None] = ContextVar("paxattn_tuned", default=None)
_asked: ContextVar[list[Question] | None] = ContextVar("paxattn_asked", default=None)
_warned: set[tuple] = set()


@contextlib.contextmanager
def use(entries: Sequence[Entry]) -> Iterator[None]:
    """Within it, `pick` knows these entries, and no tables. What is compiled already stays."""
    token = _given.set(tuple(entries))
    try:
        yield
    finally:
        _given.reset(token)


@contextlib.contextmanager
def listen() -> Iterator[list[Question]]:
    """Within it, what kernels ask is noted in the list that it gives."""
    questions: list[Question] = []
    token = _asked.set(questions)
    try:
        yield questions
    finally:
        _asked.reset(token)


def entries() -> tuple[Entry, ...]:
    """All that `pick` knows; of two for the same the last counts.

    Raises:
        ValueError: a table is damaged.
    """
    given = _given.get()
    return (*read(PACKAGE_TABLE), *read(user_table())) if given is None else given


def pick(
    kernel: str,
    *,
    device: str,
    key: Mapping[str, Any],
    default: Config,
    candidates: Iterable[Config],
    max_q_len: int | None = None,
) -> Config:
    """Chooses a config. To be called while tracing, outside of any `jax.jit` of the library's own.

    Args:
        kernel: which kernel.
        device: the device's kind.
        key: static facts that the choice depends on, as JSON has them.
        default: the heuristic's config.
        candidates: what the kernel can be built with.
        max_q_len: as in `Question`.

    Returns:
        The tuned config, or the default where no entry fits. An entry that is no candidate (any
        more) is passed over with a warning.

    Raises:
        ValueError: a table is damaged.
    """
    every = tuple(dict.fromkeys((default, *candidates)))
    question = Question(
        device=device, kernel=kernel, key=key, default=default, candidates=every,
        max_q_len=max_q_len,
    )  # fmt: skip
    asked = _asked.get()
    if asked is not None:
        asked.append(question)
    entry = find(question)
    if entry is None:
        return default
    config = fitting(entry, question)
    if config is None:
        if entry.place not in _warned:
            _warned.add(entry.place)
            warnings.warn(
                f"the tuned config {dict(entry.config)} of {kernel} for {dict(key)} on "
                f"{device} is none that this version can be built with, so its heuristic chooses: "
                "run `paxattn bench --tune` again",
                stacklevel=2,
            )
        return default
    return config


def key_of(page_dtype: str | None, **facts: str | int) -> dict[str, str | int]:
    """A key: static facts, and of quantised pages their dtype."""
    return facts if page_dtype is None else facts | {"page_dtype": page_dtype}


def measured_on(device: str, *, page_dtype: str | None) -> frozenset[str]:
    """Kernels that a table has any entry of, for a kind of device and a dtype of pages.

    Args:
        device: the device's kind.
        page_dtype: of quantised pages, or None.

    Returns:
        Their names.

    Raises:
        ValueError: a table is damaged.
    """
    return frozenset(
        entry.kernel
        for entry in entries()
        if entry.device == device and entry.key.get("page_dtype") == page_dtype
    )


def find(question: Question) -> Entry | None:
    """The entry that answers a question, if a table has one."""
    place = question.entry(question.default).place
    return next((entry for entry in reversed(entries()) if entry.place == place), None)


def fitting(entry: Entry, question: Question) -> Any | None:
    """The candidate that an entry means, or None."""
    known = {f.name for f in dataclasses.fields(question.default)}
    if not set(entry.config) <= known:
        return None
    config = dataclasses.replace(question.default, **entry.config)
    return config if config in question.candidates else None
