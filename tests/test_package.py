"""The wheel: what is in it, and that it works in an environment and a folder without the repository."""

import json
import sys
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml
from helpers import processes
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tiedlora
from tiedlora.places import CONF, PROJECT

TINY = ["model=tiny_llama", "train=tiny", "task=chain_sum", "train.threads=1", "tracking=none"]
FEW = ["task.options.rows={train: 40, validation: 12, test: 12}", "task.rows.validation=null", "train.steps=4"]
SCRIPT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import tiedlora
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
model = LlamaForCausalLM(LlamaConfig(**sizes))
attached = tiedlora.attach(model, "TABuv", rank=8)
model(torch.tensor([[1, 2]])).logits.sum().backward()
attached.save_pretrained("adapter")
print(tiedlora.__version__, tiedlora.__file__)
"""


def test_the_constraints_name_every_package_that_an_installation_for_developers_has():
    """Two installations have the same versions. What torch itself needs depends on its build, and is left out."""
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line and line[0] != "#"}
    needed, left = set(), [Requirement("tiedlora[dev]")]
    while left:
        package = left.pop()
        for needs in map(Requirement, metadata.requires(package.name) or []):
            name, extras = canonicalize_name(needs.name), ["", *package.extras]
            is_here = needs.marker is None or any(needs.marker.evaluate({"extra": extra}) for extra in extras)
            if is_here and name not in ("torch", "tiedlora") and (name, *sorted(needs.extras)) not in needed:
                needed.add((name, *sorted(needs.extras)))
                left.append(needs)
    assert {name for name, *_ in needed} - pinned == set()


def files_in(*folders: str) -> dict[str, Path]:
    """Path from the top of the repository -> file, without what Python has compiled."""
    found = [path for folder in folders for path in (PROJECT / folder).rglob("*") if path.is_file()]
    return {path.relative_to(PROJECT).as_posix(): path for path in found if "__pycache__" not in path.parts}


def test_the_wheel_has_the_code_the_options_and_the_command_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    metadata = {name: data for name, data in held.items() if ".dist-info/" in name}
    code = {name.removeprefix("src/"): path for name, path in files_in("src").items() if ".egg-info/" not in name}
    options = {f"tiedlora/{name}": path for name, path in files_in("conf", "sweeps", "claims").items()}
    assert {name: data for name, data in held.items() if name not in metadata} == {
        name: path.read_bytes() for name, path in (code | options).items()
    }
    # Another package may have its plug-ins in this namespace.
    assert "hydra_plugins/__init__.py" not in held
    (entry,) = [data.decode() for name, data in metadata.items() if name.endswith("entry_points.txt")]
    assert entry.split() == ["[console_scripts]", "tiedlora", "=", "tiedlora.__main__:main"]
    assert f"tiedlora-{tiedlora.__version__}.dist-info/METADATA" in metadata


def test_a_source_distribution_makes_the_same_wheel(wheel, tmp_path):
    processes.run_python("-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=PROJECT, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    processes.run(["tar", "-xf", archive, "-C", tmp_path], check=True)
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    processes.run_python("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=source, check=True)
    (again,) = tmp_path.glob("*.whl")
    assert sums(again) == sums(wheel)


def sums(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


Command = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel, and with the packages of this one, but not with this checkout.

    It stands in a git repository: its commits are not the package's.
    """
    folder = tmp_path_factory.mktemp("installed")
    processes.run(["git", "init", folder], check=True)
    place = folder / "environment"
    processes.run_python("-m", "venv", "--without-pip", place, check=True)
    pip = ("-m", "pip", "--python", place / "bin" / "python", "install", "--no-deps", "--no-index", "--no-compile")
    processes.run_python(*pip, wheel, check=True)
    (packages,) = place.glob("lib/*/site-packages")
    # Folders that stand in a .pth file are searched for packages, and their own .pth files are not read: that of an
    # editable install names the checkout.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    return place


@pytest.fixture
def installed(environment, tmp_path, monkeypatch) -> Command:
    """Run a program of the environment, by default in a new folder, whose user has no cache yet."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("PYTHONPATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()

    def run(program: str, *words: str, cwd: Path = tmp_path / "work") -> CompletedProcess[str]:
        return processes.run([environment / "bin" / program, *words], cwd=cwd)

    return run


def succeeded(done: CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_compares_files_of_another_folder(installed, environment, tmp_path):
    for name, step in (("a", 3), ("b", 2)):
        rows = [json.dumps({"id": number, "correct": number % step == 0}) + "\n" for number in range(30)]
        (tmp_path / "work" / f"{name}.jsonl").write_text("".join(rows))
    assert "B - A [95 %]" in succeeded(installed("tiedlora", "compare", "a.jsonl", "b.jsonl"))
    place = succeeded(installed("python", "-c", "import tiedlora; print(tiedlora.__file__)"))
    assert Path(place.strip()).is_relative_to(environment)


@pytest.mark.slow
def test_a_first_run_and_what_comes_after_it(installed, environment, tmp_path):
    work = tmp_path / "work"
    out = succeeded(installed("tiedlora", "train", *TINY))
    (run,) = (work / "outputs").glob("TABuv-*")
    assert str(run) in out
    assert {path.name for path in work.iterdir()} == {"outputs"}
    assert (tmp_path / "home" / ".cache" / "tiedlora").is_dir()
    record = json.loads((run / "result.json").read_text())
    # It stands in a repository, but this is not the code's.
    assert record["code"] == {"commit": None, "dirty": None, "version": tiedlora.__version__}
    assert "finished before" in succeeded(installed("tiedlora", "train", *TINY))

    trained = succeeded(installed("tiedlora", "params", "model=tiny_llama", "tying=TABuv", "train=tiny"))
    assert f"{record['trainable_params']:,}" in trained
    assert "LoRA_qkv" in succeeded(installed("tiedlora", "params"))
    report = succeeded(installed("tiedlora", "report", "outputs", "--out", "report"))
    assert f"version {tiedlora.__version__}" in (work / "report" / "index.html").read_text() + report
    succeeded(installed("tiedlora", "export", str(run), "--to", "hub-card"))
    card = (run / "export" / "hub-card" / "README.md").read_text()
    assert f"| made with | tiedlora {tiedlora.__version__} |" in card
    succeeded(installed("tiedlora", "export", str(run), "--to", "peft"))
    assert (run / "export" / "peft" / "adapter_model.safetensors").is_file()
    assert "agree" in succeeded(installed("tiedlora", "verify", str(run), "--rows", "4"))
    version, file = succeeded(installed("python", "-c", SCRIPT)).split()
    assert version == tiedlora.__version__
    assert Path(file).is_relative_to(environment)
    assert (work / "adapter" / "adapter.json").is_file()


@pytest.mark.slow
def test_two_runs_on_rows_of_a_csv_are_compared(installed, tmp_path):
    rows = "".join(f"say {n} please,topic {n % 7}\n" for n in range(40))
    (tmp_path / "work" / "tickets.csv").write_text(f"text,topic\n{rows}")
    words = ["task=rows", "task.files=tickets.csv", 'task.prompt="{text}"', 'task.target=" {topic}"']
    words += ["task.metrics=[exact_match]", "task.max_new_tokens=6", "train.steps=4", "score.metrics=null"]
    own = [word for word in TINY if not word.startswith("task=")]
    for tying in ("LoRA", "TABuv"):
        succeeded(installed("tiedlora", "train", *own, *words, f"tying={tying}"))
    runs = [str(path.parent) for path in sorted((tmp_path / "work" / "outputs").glob("*/result.json"))]
    assert len(runs) == 2
    assert "B - A [95 %]" in succeeded(installed("tiedlora", "compare", *runs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "launcher"),
    [("tiedlora", "basic"), ("tiedlora", "joblib_slots"), ("python -m tiedlora", "joblib_slots")],
)
def test_a_sweep_starts_its_workers_and_continues(program, launcher, installed, tmp_path):
    cells = [*TINY, *FEW, "seed=0,1"]
    words = [*program.split(), "train", "--multirun", f"hydra/launcher={launcher}", *cells]
    assert "2 cells: 2 done" in succeeded(installed(*words))
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("outputs/TABuv-*/result.json")}
    assert len(results) == 2
    assert "2 cells: 2 done" in succeeded(installed(*words))
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert "2 cells: 2 done" in succeeded(installed(*program.split(), "sweep", "status", *cells))


def own_option(folder: Path) -> None:
    """Write tying=mine, which is TABuv with its own A in each layer, into a folder of options."""
    text = (CONF / "tying" / "TABuv.yaml").read_text()
    values = yaml.safe_load(text.replace("name: TABuv", "name: mine").replace("share: all", "share: 1", 1))
    (folder / "tying").mkdir(parents=True)
    (folder / "tying" / "mine.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.slow
def test_options_of_ones_own_stand_in_the_working_folder_or_where_the_command_says(installed, tmp_path):
    own_option(tmp_path / "work" / "conf")
    own_option(tmp_path / "elsewhere" / "options")
    (tmp_path / "empty").mkdir()
    succeeded(installed("tiedlora", "train", *TINY, *FEW, "tying=mine"))
    (result,) = (tmp_path / "work" / "outputs").glob("*/result.json")
    assert json.loads(result.read_text())["identity"]["tying"]["A"]["share"] == 1
    assert "mine" in succeeded(installed("tiedlora", "params", "model=tiny_llama", "tying=mine"))
    outputs = f"outputs={tmp_path}/other"
    where = ["--config-dir", str(tmp_path / "elsewhere" / "options")]
    succeeded(installed("tiedlora", "train", *where, *TINY, *FEW, "tying=mine", outputs, cwd=tmp_path / "empty"))
    assert (tmp_path / "other" / result.parent.name / "result.json").is_file()
    done = installed("tiedlora", "train", *TINY, "tying=mine", cwd=tmp_path / "empty")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: tying=mine: no such option; choose one of LoRA, " in done.stderr


@pytest.mark.slow
def test_what_records_a_commit_needs_a_checkout(installed, tmp_path):
    folder = tmp_path / "work" / "study"
    folder.mkdir()
    part = "{name: one, words: [model=tiny_llama], sweeps: [[seed=0]]}"
    (folder / "study.yaml").write_text(f"name: study\nwords: []\nparts: [{part}]\n")
    plan = succeeded(installed("tiedlora", "study", "plan", "study"))
    assert plan.startswith("one: tiedlora train --multirun model=tiny_llama ")
    for words, says in {
        ("study", "run", "study"): "study run: its runs record the commit of the code",
        ("gpu",): "gpu: runs the tests of a checkout of the project",
    }.items():
        done = installed("tiedlora", *words)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert says in done.stderr
