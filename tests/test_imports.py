"""Packages import in one direction; what imports no torch, places of Hydra, and sizes of files."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"
HOUSE = SRC / "tiedlora"
ORDER = (
    "__main__",
    "commands",
    "sweeps",
    "page",
    "runs",
    "scoring",
    "export",
    "analysis",
    "training",
    "tracking",
    "data",
    "models",
    "tasks",
    "records",
    "config",
    "adapter",
    # The modules of tiedlora itself. They import no package.
    "other_methods",
    "families",
    "tying",
    "description",
    "reading",
    "keys",
    "screen",
    "text",
    "storage",
    "places",
    "errors",
)
"""From top to bottom: a package may import what stands after it. CONTRIBUTING.md lists the packages in this order."""
HYDRA_ROOMS = ("commands", "sweeps", "config")
NO_TORCH = ("commands", "sweeps", "page", "analysis", "records", "config", "tasks", "tracking")
WITHOUT_TORCH = ("runs.run", "runs.inputs", "analysis.metrics", "scoring.wanted", "models.identity")
"""Modules of other packages that must import no torch either."""
TRACKERS = {("tracking", name) for name in ("wandb", "trackio", "mlflow")}
"""Modules that import a tracker's package."""
LONGEST_FILE = 600
MOST_SILENCED = 20
"""Findings of the linter that may be silenced, beside imports inside functions."""


def imports(path: Path) -> Iterator[str]:
    """Every imported module of a file; not those for types."""
    tree = ast.parse(path.read_text())
    typing_only: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            typing_only |= set(map(id, ast.walk(node)))
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # `from tiedlora import tying` imports the module tiedlora.tying.
            names = [f"tiedlora.{alias.name}" for alias in node.names] if node.module == "tiedlora" else [node.module]
            yield from map(str, names)


def test_packages_import_one_way_and_hydra_in_its_rooms_alone():
    wrong = []
    for path in sorted(HOUSE.rglob("*.py")):
        here = path.relative_to(HOUSE).parts[0].removesuffix(".py")
        for module in imports(path):
            is_wrong = module.split(".")[0] == "hydra" and here not in HYDRA_ROOMS
            if module.startswith("tiedlora.") and here != "__init__":
                there = module.split(".")[1]
                is_wrong = here != there and ORDER.index(here) >= ORDER.index(there)
            if is_wrong:
                wrong.append(f"{path.relative_to(SRC)} imports {module}")
    assert not wrong


def test_every_package_has_its_place_in_contributing_too_and_says_what_belongs_there():
    packages = {path.parent.name for path in HOUSE.glob("*/__init__.py")}
    tops = {path.stem for path in HOUSE.glob("*.py")} - {"__init__"}
    assert packages | tops == set(ORDER)
    contributing = (SRC.parent / "CONTRIBUTING.md").read_text()
    places = [contributing.index(f"`{name}/`" if name in packages else f"`{name}.py`") for name in ORDER]
    assert places == sorted(places)
    for package in packages:
        text = ast.get_docstring(ast.parse((HOUSE / package / "__init__.py").read_text()))
        assert text, package
        assert "import" in text.lower(), f"{package}: its docstring does not say what it may import"


def test_what_needs_no_torch_imports_none():
    names = [f"tiedlora.{name}" for name in WITHOUT_TORCH]
    for package in NO_TORCH:
        modules = sorted(path.stem for path in (HOUSE / package).glob("*.py"))
        own = [name for name in modules if name != "task_metric" and (package, name) not in TRACKERS]
        names += [f"tiedlora.{package}.{name}" for name in own]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


CHANGES_ENVIRONMENT = re.compile(
    r"os\.environ(\[.*\] (\|)?= |\.(setdefault|pop|update|clear)\(| \|= )|os\.(put|unset)env\("
)


def test_no_module_changes_the_environment_when_it_is_imported():
    """It would change what the whole process sees, and every process that it starts."""
    wrong = []
    for folder in ("src", "scripts", "examples", "benchmarks", "tests"):
        for path in sorted((SRC.parent / folder).rglob("*.py")):
            # The tests begin with an environment that tests/conftest.py makes.
            statements = [] if path == SRC.parent / "tests" / "conftest.py" else ast.parse(path.read_text()).body
            for statement in statements:
                is_main = isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test)
                is_run = not isinstance(statement, ast.FunctionDef | ast.ClassDef) and not is_main
                if is_run and CHANGES_ENVIRONMENT.search(ast.unparse(statement)):
                    wrong.append(f"{path.relative_to(SRC.parent)}:{statement.lineno}")
    assert not wrong


def test_to_collect_the_tests_changes_no_variable_of_the_environment(changed_by_collecting):
    """Of all files that pytest was given. A module that set one at its import would change what other tests see."""
    # torch 2.9 names the folder of its compiler's cache at an import.
    assert changed_by_collecting.keys() <= {"TORCHINDUCTOR_CACHE_DIR"}


def test_the_list_of_a_sweeps_cells_loads_no_scipy_stats():
    """It takes a second, which `plan` and `status` would take longer."""
    source = "import sys, tiedlora.commands.sweep; sys.exit('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], timeout=120).returncode == 0


ATTACHED = """
import sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import tiedlora
from tiedlora.adapter.attach import attach_saved
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
model = LlamaForCausalLM(LlamaConfig(**sizes))
attached = tiedlora.attach(model, "TABuv", rank=8)
model(torch.tensor([[1, 2]]))
attached.save_pretrained(sys.argv[1])
attached.detach()
attach_saved(model, Path(sys.argv[1]))
packages = {name.split(".")[1] for name in sys.modules if name.startswith("tiedlora.")}
print(sorted({"hydra", "omegaconf"} & set(sys.modules)), sorted(packages))
"""


def test_the_method_stands_alone(tmp_path):
    """Who only attaches an adapter gets the method, and no harness around it."""
    done = subprocess.run([sys.executable, "-c", ATTACHED, tmp_path], capture_output=True, text=True, timeout=120)
    others, packages = done.stdout.strip().split("] [")
    assert others == "["
    assert set(re.findall(r"\w+", packages)) <= set(ORDER[ORDER.index("adapter") :]), done.stderr


def test_a_type_of_values_has_one_name_and_a_name_has_one_type():
    places: dict[str, list[str]] = {}
    for path in sorted(HOUSE.rglob("*.py")):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.value).startswith("Annotated["):
                places.setdefault(ast.unparse(statement.targets[0]), []).append(path.relative_to(SRC).as_posix())
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def own_files() -> list[Path]:
    folders = ("src", "tests", "benchmarks", "scripts", "examples")
    return [path for folder in folders for path in sorted((SRC.parent / folder).rglob("*.py"))]


def test_no_room_is_too_long():
    assert not [path for path in own_files() if len(path.read_text().splitlines()) > LONGEST_FILE]


def test_what_the_linter_finds_is_mended_and_seldom_silenced():
    mark, late_import = "# no" + "qa", "PLC0415"
    silenced = []
    for path in own_files():
        lines = [line for line in path.read_text().splitlines() if mark in line]
        silenced += [f"{path.name}: {line}" for line in lines if late_import not in line]
    without_reason = [line for line in silenced if not re.search(mark + r": [A-Z]+\d+  \(.+\)$", line)]
    assert not without_reason, "the reason stands behind it in parentheses"
    assert len(silenced) <= MOST_SILENCED
