"""Tables of the benchmark page, from the JSON that the benchmarks wrote."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def on_page_markdown(markdown, page, **_):
    """Replaces a line `{{ results NAME }}` by what results/NAME.json holds."""
    if page.file.src_uri != "benchmarks.md":
        return markdown
    out = []
    for line in markdown.splitlines():
        name = line.removeprefix("{{ results ").removesuffix(" }}")
        out += [line] if name == line else _results(name)
    return "\n".join(out)


def _results(name):
    path = RESULTS / f"{name}.json"
    lines = []
    for entry in json.loads(path.read_text()):
        machine = entry["machine"]
        lines += [
            f"*{machine['cores']} cores of {machine['cpu']}, {', '.join(machine['devices'])}, "
            f"Python {machine['python']}, jax {machine['jax']}, {machine['date']}.*",
            "",
        ]
        tables = {"": entry["rows"]} | {
            key: value
            for key, value in entry.items()
            if key != "rows" and isinstance(value, list) and value and isinstance(value[0], dict)
        }
        for title, rows in tables.items():
            if rows:
                lines += [f"Beside {title}:", ""] if title else []
                lines += _table(rows)
    return lines


def _table(rows):
    columns = list(rows[0])
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|" + "".join(" --- |" if isinstance(rows[0][c], str) else " ---: |" for c in columns),
    ]
    lines += ["| " + " | ".join(_text(row.get(c)) for c in columns) + " |" for row in rows]
    return [*lines, ""]


def _text(value):
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
