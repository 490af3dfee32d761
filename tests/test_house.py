"""The shape of the house: imports run in one direction, and the README's code runs."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "paxattn"

# In the order of the data: a later room may import an earlier one, never the reverse.
ROOMS = [
    "page_table",
    "prefix_cache",
    "quantized",
    "target",
    "kv_cache",
    "pool",
    "shared_prefix",
    "tree",
    "ragged",
    "attention",
    "rope",
    "nn",
    "models",
    "step",
    "kept_pool",
    "packing",
    "penalties",
    "sampling",
    "decode_step",
    "beam",
    "ngram",
    "speculative",
    "text",
    "requests",
    "results",
    "loops",
    "generate_beams",
    "generate",
    "serving",
    "memory",
    "__init__",
    "display",
    "server",
    "cli",
    "__main__",
]


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "paxattn":
                room = parts[1] if len(parts) > 1 else "__init__"
                yield room if room in ROOMS else "__init__"


def test_every_module_has_its_place():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} == set(ROOMS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_imports_run_in_one_direction(path):
    own = ROOMS.index(room_of(path))
    later = [room for room in imported_rooms(path) if ROOMS.index(room) > own]
    assert not later, f"{path.relative_to(ROOT)} imports {later}, which come after it"


PAGES = sorted((ROOT / "docs").rglob("*.md"))


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


@pytest.mark.docs
@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda p: p.stem
)
def test_documentation_runs(page):
    """The blocks of a page are one program."""
    program = "\n".join(blocks(page.read_text(), "python"))
    exec(compile(program, str(page), "exec"), {})


def readme_blocks(language):
    return blocks((ROOT / "README.md").read_text(), language)


@pytest.mark.docs
@pytest.mark.parametrize("index", range(len(readme_blocks("python"))))
def test_readme_code_runs(index, capsys):
    exec(compile(readme_blocks("python")[index], f"README.md block {index}", "exec"), {})
    assert capsys.readouterr().out
