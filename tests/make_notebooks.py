"""Runs the notebooks of `examples/` and stores what they show: `python tests/make_notebooks.py`.

Names of notebooks as arguments run only those. What is stored holds no times, warnings or counters,
so that running a notebook again changes only what it measures (cells with the tag "varies").
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401 (builds its font cache, which a notebook would report)
import nbclient
import nbformat

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PICTURE = ROOT / "docs" / "same_memory.png"  # the README's: what the cell with this tag draws
SECONDS_PER_CELL = 240


def run(path: Path) -> Any:
    """Runs a notebook in a kernel of its own; the notebook with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("metadata", {}).pop("needs_background", None)  # they do with any
    notebook.metadata.language_info = {"name": "python"}  # (without the version)
    return notebook


def picture_of(notebook: Any, tag: str) -> bytes | None:
    """The PNG that the cell with a tag shows, if there is such a cell."""
    for cell in notebook.cells:
        if tag in cell.metadata.get("tags", ()):
            pictures = [output.data["image/png"] for output in cell.outputs if "data" in output]
            return base64.b64decode(pictures[0])
    return None


def main() -> None:
    for path in NOTEBOOKS:
        if len(sys.argv) > 1 and path.stem not in sys.argv[1:]:
            continue
        notebook = run(path)
        nbformat.write(notebook, path)
        picture = picture_of(notebook, PICTURE.stem)
        if picture is not None:
            PICTURE.write_bytes(picture)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
