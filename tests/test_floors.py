"""The house has floors: a module imports only from floors below its own, or from its own room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fasttrain"

FLOORS = {
    "errors": 0,
    "device": 1,
    "json_text": 1,
    "printable": 1,
    "data": 2,
    "metrics": 2,
    "history": 2,
    "comparison": 2,
    "receipt": 2,
    "step": 3,
    "pages": 3,
    "progress": 3,
    "loop": 4,
    "reference": 4,
    "info": 4,
    "run": 4,
    "workloads": 5,
    "measure": 6,
    "commands": 7,
    "cli": 8,
    "__main__": 9,
    "__init__": 9,
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("fasttrain.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: import by full name"
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_downwards(path: Path) -> None:
    own = room(path)
    assert own in FLOORS, f"{own} has no floor: give it one"
    too_high = {other for other in imported_rooms(path) if other != own and FLOORS[other] >= FLOORS[own]}
    assert not too_high, f"{own} (floor {FLOORS[own]}) imports {too_high}"


STEP_FLOORS = (
    ("spec",),
    ("kernels", "state", "cache", "eager"),
    ("optimizer", "timing"),
    ("capture",),
    ("guards", "function"),
    ("trace",),
    ("program",),
    ("build", "verify", "walk"),
    ("compiler",),
    ("candidate",),
    ("cudagraph", "ladder"),
    ("train_step",),
)
"""The floors inside `step`, the lowest first: a module imports from floors below its own; `torch_private` is lowest."""

STEP = PACKAGE / "step"


def test_the_modules_of_a_step_import_only_downwards() -> None:
    floors = {name: number for number, names in enumerate(STEP_FLOORS) for name in names}
    modules = {path.stem: path for path in STEP.glob("*.py") if path.stem != "__init__"}
    assert modules.keys() == floors.keys()
    for name, path in modules.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("fasttrain.step."):
                found.add(module.split(".")[2])
        too_high = {other for other in found - {"torch_private"} if floors[other] >= floors[name]}
        assert not too_high, f"{name} imports {too_high}"


def test_the_house_of_a_step_stays_small() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in STEP.rglob("*.py")}
    assert len([path for path in lengths if path.parent == STEP and path.stem != "__init__"]) <= 20
    assert max(lengths.values()) <= 700, "a module holds one idea, in 700 lines at most"


def test_what_importing_the_loop_imports() -> None:
    command = "import sys, fasttrain.loop\nprint(sum(name.startswith('fasttrain') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 43
