"""Who may import whom (design, section 2): only lower floors and one's own folder; paper is the standard library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "isthmus"
FLOORS = {
    "errors": -1,
    "messages": -1,
    "runtime": -1,
    "records": -1,
    "atomic": -1,
    "cache": -1,
    "arch": 0,
    "nn": 1,
    "data": 1,
    "weights": 2,
    "evaluation": 2,
    "train": 3,
    "diagnose": 3,
    "deploy": 3,
    "report": 4,
    "examine": 4,
    "run": 5,
    "ship": 5,
    "cli": 6,
}
FILES = sorted(SRC.rglob("*.py"))
DOORS = {"__init__", "__main__"}  # the package's own two, which open on everything


def part(path: Path) -> str:
    """The folder or single file of `isthmus` that a source file belongs to."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path, *, at_import: bool = False) -> set[str]:
    """Full names of the modules a file imports, anywhere in it or only what runs when it is imported."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            module = node.module or ""
            names.update(f"{module}.{alias.name}" for alias in node.names) if module == "isthmus" else names.add(module)
        checked = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_import and (checked or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def label(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


def test_every_part_has_a_floor():
    assert {part(path) for path in FILES} - DOORS <= set(FLOORS)


@pytest.mark.parametrize("path", [path for path in FILES if part(path) not in DOORS], ids=label)
def test_only_lower_floors_and_the_own_folder(path):
    own = part(path)
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package != "isthmus":
            continue
        other = rest.partition(".")[0]
        assert other, f"{label(path)} imports the package itself; name the module"
        assert other in FLOORS, f"{label(path)} imports isthmus.{other}, which has no floor"
        alone = FLOORS[own] == -1 and FLOORS[other] == -1  # the ground below all is one folder
        assert other == own or alone or FLOORS[other] < FLOORS[own], f"{label(path)} may not import {name}"


@pytest.mark.parametrize("path", [path for path in FILES if part(path) != "__main__"], ids=label)
def test_nothing_imports_the_command_line(path):
    assert part(path) == "cli" or not any(name.startswith("isthmus.cli") for name in imports(path))


@pytest.mark.parametrize("path", [path for path in FILES if FLOORS.get(part(path), 9) <= 0], ids=label)
def test_the_lowest_floors_are_the_standard_library(path):
    """Everywhere in `arch`; at import time in what stands below it (`runtime` asks torch inside functions)."""
    names = imports(path, at_import=part(path) != "arch")
    foreign = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"isthmus"}
    assert not foreign, f"{label(path)} imports {sorted(foreign)}"


OPTIONAL = {
    "aiohttp",
    "datasets",
    "fastapi",
    "fsspec",
    "h5py",
    "huggingface_hub",
    "keras",
    "onnx",
    "onnxruntime",
    "openvino",
    "prometheus_client",
    "ray",
    "starlette",
    "uvicorn",
    "matplotlib",
    "jinja2",
    "timm",
    "transformers",
    "tensorboard",
    "elpv_dataset",
}


@pytest.mark.parametrize("path", FILES, ids=label)
def test_optional_libraries_are_imported_where_they_are_used(path):
    heavy = {name.partition(".")[0] for name in imports(path, at_import=True)} & OPTIONAL
    assert not heavy, f"{label(path)} imports {sorted(heavy)} for everyone"


def test_importing_the_package_loads_no_heavy_library():
    heavy = "{'torch', 'torchvision', 'numpy', 'PIL', 'cyclopts', 'rich'}"
    code = f"import sys, isthmus; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
