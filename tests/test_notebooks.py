"""The notebooks of `examples/`: what is stored and, with `-m notebooks`, that it is not stale."""

import base64
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
COLAB = "https://colab.research.google.com"


def badge(path):
    place = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/main/examples/{path.name}"
    image = f"![Open in Colab]({COLAB}/assets/colab-badge.svg)"
    return f"[{image}]({COLAB}/github/{place})"


def text(lines):
    return lines if isinstance(lines, str) else "".join(lines)


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def varies(cell):
    """What it shows is measured, or depends on the machine."""
    return "varies" in cell["metadata"].get("tags", ())


def shown(cell):
    """Of a cell what must stay: kinds of outputs, and the text of those that have any."""
    out = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            out.append((output["name"], text(output["text"])))
        else:
            data = output["data"]
            out.append((" ".join(sorted(data)), text(data.get("text/plain", ""))))
    return out


parametrized = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_six():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i}_" for i in range(1, 7)]


@parametrized
def test_a_notebook_can_be_opened_and_installs_this_package(path):
    cells = json.loads(path.read_text())["cells"]
    assert text(cells[0]["source"]) == badge(path)
    install = text(code_cells({"cells": cells})[0]["source"])
    assert 'find_spec("paxattn") is None' in install
    assert re.search(r'"paxattn\[.*\] @ git\+(.*)"', install)[1] == REPOSITORY
    first = json.loads(NOTEBOOKS[0].read_text())
    assert install == text(code_cells(first)[0]["source"])


@parametrized
def test_a_notebook_stores_its_outputs_and_nothing_else(path):
    assert path.stat().st_size < 300_000
    notebook = json.loads(path.read_text())
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags"}
    for cell in cells:
        for kind, what in shown(cell):
            assert kind != "stderr", what
            assert not re.search(r"Warning|Traceback|/root/|/home/|/tmp/|/Users/", what)


@parametrized
def test_links_of_a_notebook_lead_somewhere(path):
    for cell in json.loads(path.read_text())["cells"]:
        for link in re.findall(r"\]\(([^)]*)\)", text(cell["source"])):
            if cell["cell_type"] == "markdown" and "://" not in link:
                assert (path.parent / link).exists(), link


def test_links_of_the_documentation_lead_somewhere():
    for page in (ROOT / "docs").rglob("*.md"):
        for link in re.findall(r"\]\((https://github.com/[^)]*)\)", page.read_text()):
            place = re.fullmatch(re.escape(REPOSITORY) + r"/(blob|tree)/main/(.*)", link)
            assert place is not None, link
            assert (ROOT / place[2]).exists(), link


def test_the_readme_has_every_notebook_and_the_picture():
    readme = (ROOT / "README.md").read_text()
    assert "(docs/same_memory.png)" in readme
    drawn = [
        base64.b64decode(output["data"]["image/png"])
        for path in NOTEBOOKS
        for cell in code_cells(json.loads(path.read_text()))
        for output in cell["outputs"]
        if "same_memory" in cell["metadata"].get("tags", ())
    ]
    assert drawn == [(ROOT / "docs" / "same_memory.png").read_bytes()]
    assert len(drawn[0]) < 150_000
    for path in NOTEBOOKS:
        assert f"(examples/{path.name})" in readme
        assert badge(path) in readme


@pytest.mark.notebooks
@pytest.mark.timeout(600)
@parametrized
def test_a_notebook_runs_and_shows_what_it_stores(path):
    """From a clean kernel. If it shows something else: `python tests/make_notebooks.py`."""
    from make_notebooks import run

    stored = json.loads(path.read_text())
    fresh = run(path)
    for i, (old, new) in enumerate(zip(stored["cells"], fresh.cells, strict=True)):
        if old["cell_type"] != "code":
            continue
        was, now = shown(old), shown(new)
        assert "stderr" not in {kind for kind, _ in now}, now
        if varies(old):
            assert [kind for kind, _ in was] == [kind for kind, _ in now], f"cell {i}"
        else:
            assert was == now, f"cell {i} shows something else than what is stored"
