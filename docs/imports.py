"""Draw the imports between the packages of inlaid, by layer: `docs/images/imports.svg`.

`python docs/imports.py` writes the picture and prints each package with the packages that it imports. A test
compares the layers with the code (`tests/test_structure.py`).
"""

from __future__ import annotations

import ast
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/inlaid"
PICTURE = ROOT / "docs/images/imports.svg"
LAYERS = (
    ("cli",),
    ("check", "evaluation"),
    ("training",),
    ("generation",),
    ("data",),
    ("adapters",),
    ("alpha",),
    ("families",),
    ("runs",),
    ("tiny",),
    ("media", "networks", "objectives"),
    ("config",),
    ("console", "files"),
    ("paths",),
    ("reading",),
    ("limits", "text"),
)
"""Top-level modules of the package from top to bottom; imports go down only."""


def module(file: Path) -> str:
    """Return the dotted module name of a source file."""
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports() -> dict[str, set[str]]:
    """Return the modules that each module imports when it runs, including imports inside functions.

    Imports only for type checking are excluded.
    """
    files = sorted(SOURCE.rglob("*.py"))
    known = {module(f) for f in files}
    found: dict[str, set[str]] = {}
    for file in files:
        name, tree = module(file), ast.parse(file.read_text("utf-8"))
        types = {
            n
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for n in ast.walk(block)
        }
        found[name] = set()
        for node in ast.walk(tree):
            if node in types or not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            if isinstance(node, ast.Import):
                targets = [a.name for a in node.names]
            else:
                base = node.module or ""
                if node.level:
                    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
                    package = package[: len(package) - node.level + 1]
                    base = ".".join([*package, *([base] if base else [])])
                targets = [t if (t := f"{base}.{a.name}") in known else base for a in node.names]
            found[name] |= {t for t in targets if t in known and t not in (name, "inlaid")}
    return found


def between() -> Counter[tuple[str, str]]:
    """Return the number of imports per pair of top-level modules (importing, imported)."""
    graph = imports()
    top = {m: m.split(".")[1] for m in graph if m.count(".") and not m.endswith("__main__")}
    pairs = [(top[a], top[b]) for a, found in graph.items() if a in top for b in found if b in top]
    return Counter(p for p in pairs if p[0] != p[1])


def draw(edges: Counter[tuple[str, str]]) -> str:
    """Return the picture as SVG: one row per layer, one line per pair of packages."""
    width, row, box = 860, 76, (150, 34)
    place = {}
    for y, layer in enumerate(LAYERS):
        for x, name in enumerate(layer):
            place[name] = (width * (x + 1) / (len(layer) + 1), 40 + y * row)
    out = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {len(LAYERS) * row}" '
            'font-family="sans-serif" font-size="15">'
        ),
        f'<rect width="{width}" height="{len(LAYERS) * row}" fill="#ffffff"/>',
    ]
    for (a, b), count in sorted(edges.items()):
        (x1, y1), (x2, y2) = place[a], place[b]
        color, bend = "#5b7da8" if y2 > y1 else "#c0392b", (y2 - y1) * 0.32 * (1 if (y1 + x2) % 3 else -1)
        middle = (x1 + x2) / 2 + bend
        out.append(
            f'<path d="M{x1:.0f} {y1 + box[1] / 2:.0f} Q{middle:.0f} {(y1 + y2) / 2:.0f} {x2:.0f} '
            f'{y2 - box[1] / 2:.0f}" fill="none" stroke="{color}" stroke-opacity="0.55" '
            f'stroke-width="{1 + min(count, 24) / 8:.1f}"><title>{a} imports {b}: {count}</title></path>'
        )
    for name, (x, y) in place.items():
        out.append(
            f'<rect x="{x - box[0] / 2:.0f}" y="{y - box[1] / 2:.0f}" width="{box[0]}" height="{box[1]}" '
            f'rx="6" fill="#eef3f9" stroke="#34506f"/><text x="{x:.0f}" y="{y + 5:.0f}" '
            f'text-anchor="middle" fill="#1d2b3a">{escape(name)}</text>'
        )
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    found = between()
    PICTURE.write_text(draw(found), "utf-8")
    for layer in LAYERS:
        for name in layer:
            print(f"{name:12} imports {', '.join(sorted(b for a, b in found if a == name)) or 'nothing'}")
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    print(
        f"{len(found)} pairs, {sum(rank[a] >= rank[b] for a, b in found)} upward; {PICTURE.relative_to(ROOT)}"
    )
