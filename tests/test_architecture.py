"""The parts of the package import only from the parts that `docs/architecture.md` puts before."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_linger"
ARROW = " -> "


def layers(page: str) -> list[str]:
    """Return the parts in the order in which a page lists them."""
    (line,) = [line for line in (ROOT / page).read_text().splitlines() if line.count(ARROW) > 2]
    return line.split(ARROW)


LAYERS = layers("docs/architecture.md")


def imported(file: Path) -> Iterator[str]:
    """Return the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relative to itself"
            yield str(node.module)


def part_of(module: str) -> str | None:
    """Return the part of the package that a module lies in, None for another package."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == PACKAGE.name else None


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_the_page_lists_every_part() -> None:
    parts = {file.relative_to(PACKAGE).parts[0] for file in files() if file.parent != PACKAGE}
    assert parts == set(LAYERS)


def test_the_page_names_files_that_there_are() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([a-z_]+/(?:[a-z_]+\.py)?)`", page))
    assert "core/function_mode.py" in named
    for name in named:
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name


def test_the_guide_lists_the_same_order() -> None:
    assert layers("CONTRIBUTING.md") == LAYERS


@pytest.mark.parametrize("part", LAYERS)
def test_a_part_imports_only_from_those_before_it(part: str) -> None:
    allowed = {"__about__", *LAYERS[: LAYERS.index(part) + 1]}
    for file in (PACKAGE / part).rglob("*.py"):
        for module in imported(file):
            assert part_of(module) in {None, *allowed}, f"{file} imports {module}"


@pytest.mark.parametrize(
    ("part", "packages"),
    [
        ("callbacks", {"lightning", "pytorch_lightning"}),
        ("export", {"onnx", "onnxruntime", "onnxscript"}),
    ],
)
def test_only_one_part_imports(part: str, packages: set[str]) -> None:
    for file in files():
        if PACKAGE / part not in file.parents:
            found = {module.partition(".")[0] for module in imported(file)}
            assert not found & packages, file
