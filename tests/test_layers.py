"""Imports go one way and in no circle, and the files that the documents name exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom to the top: a module imports from its own room, and from rooms below.
ROOMS = (
    ("config", "statistics", "precision", "metrics", "likelihood"),
    ("data",),
    ("forward",),
    ("inputs", "runs"),
    ("generation", "pages"),
    ("rounds",),
    ("streaming",),
    ("running",),
    ("measuring",),
    ("referring",),
    ("base",),
    ("dpo", "swepo", "lire", "infonca", "rrhf", "plackett_luce"),
    ("sparsepo", "emdpo", "sgpo"),
    ("trainers",),  # the public names
    ("estimate",),
    ("cli",),
    ("benchmarks", "experiments"),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
MOVED = ("loop", "em")  # old names of rooms, which forward


def modules() -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for folder in ("trainers", "benchmarks", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if name.split(".")[1:2] not in [[room] for room in MOVED]:
                found[name] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of ours that a module imports when it is imported itself; imports in functions may go anywhere."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {n for n in names if n in known} or {module}
    return found & known - {name}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[0] if parts[0] != "trainers" else parts[1] if len(parts) > 1 else "trainers"


GRAPH = {name: imports(name, path, set(modules())) for name, path in modules().items()}


def test_a_module_imports_from_its_room_or_below():
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in sorted(others)
        if room(other) != room(name) and RANK[room(other)] > RANK[room(name)]
    ]
    assert not upward


def test_no_circle():
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(GRAPH[name]):
            visit(other)
        done.add(path.pop())

    for name in GRAPH:
        visit(name)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_what_a_page_names_exists(page):
    path = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    named = re.findall(r"(?<![\w/.-])(?:trainers|scripts|configs|docs|benchmarks|experiments|tests)/[\w./-]*\w", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing
