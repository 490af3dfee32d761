"""Tensors of a checkpoint directory: safetensors files, one or several, read one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from paxattn.models.fields import CheckpointError, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ITEMSIZE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_PACKED = ("_blocks", "_scales")  # MXFP4


class TensorFiles:
    """The tensors of a directory, by name. A context manager.

    Opening reads the files' headers only; `read` reads one tensor.

    Args:
        directory: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the shards
            that it names.

    Raises:
        CheckpointError: a file is missing or damaged, the index is senseless, or points outside of
            the directory.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._files: dict[str, tuple[Path, Any]] = {}
        with ExitStack() as stack:
            if (directory / SINGLE).is_file():
                self._open(stack, directory / SINGLE, None)
            elif (directory / INDEX).is_file():
                for shard, names in _shards(directory / INDEX).items():
                    self._open(stack, directory / shard, names)
            else:
                raise CheckpointError(
                    f"{directory}: has neither {SINGLE} nor {INDEX}; weights in other formats must "
                    "be converted to safetensors first"
                )
            self._stack = stack.pop_all()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _open(self, stack: ExitStack, path: Path, names: list[str] | None) -> None:
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file, though {INDEX} names it; fetch the checkpoint again"
            )
        try:
            file = stack.enter_context(safe_open(path, framework="np"))
            present = set(file.keys())
            for name in present if names is None else names:
                if name not in present:
                    raise CheckpointError(
                        f"{path}: has no tensor {name}, though {INDEX} says so; fetch the "
                        "checkpoint again"
                    )
                header = file.get_slice(name)
                self.shapes[name] = tuple(header.get_shape())
                self._dtypes[name] = header.get_dtype()
                self._files[name] = (path, file)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None

    def size(self, name: str) -> int:
        """Bytes that a tensor takes in its file."""
        return int(np.prod(self.shapes[name])) * _ITEMSIZE.get(self._dtypes[name], 1)

    def dtype(self, name: str) -> str:
        """Name of a tensor's dtype, such as ``"bfloat16"``."""
        return {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}[
            self._dtypes[name]
        ]

    def forget(self, names: Iterable[str]) -> None:
        """Drop tensors that are not wanted, so that `check` does not call them unexpected."""
        for name in names:
            del self.shapes[name]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Require exactly these tensors.

        Raises:
            CheckpointError: tensors are missing, unexpected, of another shape, or neither floating
                point nor parts of an MXFP4 one.
        """
        missing = [name for name in shapes if name not in self.shapes]
        if missing:
            raise CheckpointError(
                f"{self.directory}: {_some(missing)} missing from the checkpoint; fetch it again, "
                "or check config.json against it"
            )
        unexpected = sorted(set(self.shapes) - set(shapes))
        if unexpected:
            raise CheckpointError(
                f"{self.directory}: {_some(unexpected)} not known to a model of this kind; "
                "check config.json against the checkpoint"
            )
        for name, shape in shapes.items():
            path = self._files[name][0]
            if self.shapes[name] != shape:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {self.shapes[name]}, but config.json asks "
                    f"for {shape}"
                )
            suitable = ("U8",) if name.endswith(_PACKED) else tuple(_ITEMSIZE)
            if self._dtypes[name] not in suitable:
                raise CheckpointError(
                    f"{path}: tensor {name} is {self._dtypes[name]}; supported are "
                    f"{', '.join(suitable)} (quantized checkpoints are not, but for MXFP4 experts)"
                )

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, in the dtype it is stored in.

        Raises:
            CheckpointError: the file cannot be read.
        """
        path, file = self._files[name]
        try:
            return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None


def _shards(index: Path) -> dict[str, list[str]]:
    """The index as shard -> tensor names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' object with tensors in it")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        # A bare file name: nothing that could lead out of the directory. (What it names may be a
        # symbolic link, as in the hub's own cache.)
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise CheckpointError(
                f"{index}: tensor {name} is said to be in {shard!r}, which is not the name of a "
                "file in this directory"
            )
        shards.setdefault(shard, []).append(name)
    return shards


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or truncated ({error}); fetch the file again")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"
