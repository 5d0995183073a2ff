"""A study: a plan that is read strictly, records that are kept by a rule, and runs that anyone can repeat."""

import gzip
import itertools
import json
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial

import pytest
from helpers import processes
from helpers.commands import wait_until
from helpers.hostile import put, snapshot
from helpers.tiny import rows_of, score_more

from tiedlora import storage
from tiedlora.analysis.runs import read_runs, run_roots
from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.errors import UserError
from tiedlora.places import PROJECT
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.selection import RateChoice, Selection, read_selection, write_selection
from tiedlora.runs import run
from tiedlora.sweeps import study
from tiedlora.sweeps.expand import compose_sweep

PLAN = """
name: small
question: does it?
words: [model=tiny_llama, seed=0]
parts:
  - name: first
    words: [task=chain_sum]
    sweeps:
      - [tying=LoRA, rank=r1]
      - ['tying=TABuv,TAB', rank=r8]
  - name: second
    words: [task=gsm_symbolic]
    sweeps:
      - [tying=LoRA]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "study.yaml").write_text(PLAN)
    return tmp_path / "small"


def test_the_commands_are_those_of_the_plan_in_its_order(folder, tmp_path):
    planned, place = study.read_study(folder).composed(tmp_path / "a, b=(ü)"), tmp_path / "a, b=(ü)"
    assert {cell.config.outputs for _, _, sweep in planned for cell in sweep.cells} == {str(place)}
    assert [(name, words) for name, words, _ in planned] == [
        ("first", ["model=tiny_llama", "seed=0", "task=chain_sum", "tying=LoRA", "rank=r1"]),
        ("first", ["model=tiny_llama", "seed=0", "task=chain_sum", "tying=TABuv,TAB", "rank=r8"]),
        ("second", ["model=tiny_llama", "seed=0", "task=gsm_symbolic", "tying=LoRA"]),
    ]


# What a study that somebody passes on may not say, and the words that refuse it.
HOSTILE = {
    "a name that is a path": (("name: small", "name: ../../evil"), "name=../../evil: becomes a folder's name"),
    "another study's name": (("name: small", "name: other"), "name=other: must be the name of the study's folder"),
    "a part's name with control characters": (("name: first", 'name: "a\\e[2J"'), "parts.0.name=a␛[2J: becomes"),
    "another place for the runs": (("seed=0", "outputs=/tmp/x"), "words.1=outputs=/tmp/x: a study cannot set outputs;"),
    "a flag of the command": (("seed=0", "--config-dir=/tmp/x"), "words.1=--config-dir=/tmp/x: must be KEY=VALUE"),
    "a program that starts": (("seed=0", "hydra.launcher._target_=os.system"), "only these keys of Hydra: hydra/sw"),
    "a misspelt key of Hydra": (("seed=0", "hydra.sweeper.finalist=2"), "(did you mean hydra.sweeper.finalists?)"),
    "an option outside conf/": (("task=chain_sum", "task=../../x"), "parts.0.words.0=task=../../x: an option of conf/"),
    "a misspelt key": (("seed=0", "train.stepz=3"), "part first: train.stepz: unknown key (did you mean train.steps?)"),
    "a value that is impossible": (("task=gsm_symbolic", "train.steps=0"), "part second: cell "),
    "nothing": (("parts:", "parts: []\nold:"), "parts=[]: must have at least 1 item"),
    "no sweeps": (("sweeps:", "swept:"), "parts.0.sweeps: is missing"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_plan_is_not_trusted(folder, script, tmp_path, what):
    """Nothing is said to be planned, and nothing is written."""
    change, says = HOSTILE[what]
    assert change[0] in PLAN
    (folder / "study.yaml").write_text(PLAN.replace(*change, 1))
    before = snapshot(tmp_path)
    code, out, err = script("scripts/study.py", "plan", folder)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert says in err
    assert "study.yaml: " in err
    assert snapshot(tmp_path) == before


def test_a_plan_is_printed_as_a_shell_reads_it(folder, script):
    (folder / "study.yaml").write_text(PLAN.replace("seed=0", "'task.target=\"$(reboot)\"', 'score.splits=[test]'"))
    code, out, _ = script("scripts/study.py", "plan", folder, "--part", "second")
    assert (code, out) == (
        0,
        "second: python train.py --multirun model=tiny_llama 'task.target=\"$(reboot)\"' score.splits=[test] "
        "task=gsm_symbolic tying=LoRA\n",
    )


WORDS = [
    "model=tiny_llama",
    "task.rows.validation=6",
    "task.max_new_tokens=4",
    "train.steps=2",
    "train.batch_size=2",
    "train.warmup_steps=1",
    "train.threads=1",
    "task.rows.test=3",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, finish):
    """Two seeds of one arm, a run that a search has stopped, and one that only paused."""
    place = tmp_path_factory.mktemp("outputs")
    words = [*WORDS, f"outputs={place}", f"cache={place}/.cache"]
    ids = []
    for seed in (0, 1):
        config = compose_config([*words, f"seed={seed}"])
        finish(config)
        ids.append(run_id(config))
    choice = RateChoice(
        "llama",
        "chain_sum",
        "TABuv",
        8,
        1e-2,
        [1e-2],
        "validation/loss",
        5.0,
        **{"seeds": 2, "trials": 3, "failed": 0, "edge": False, "run_ids": sorted(ids, reverse=True)},
    )
    # A sweep, and that of a later look.
    for name, runs in (("s-1", choice.run_ids), ("s-2", ids[1:])):
        chosen = Selection(name, "loss", [replace(choice, run_ids=runs)])
        write_selection(place / "sweeps" / name / "selection.json", chosen)
    stopped, paused = (RunFolder(place / ids[0].replace("-s0-", seed)) for seed in ("-s7-", "-s8-"))
    for name, each in itertools.product(("config.yaml", "validation_losses.jsonl"), (stopped, paused)):
        storage.write_bytes(each.path / name, storage.read_bytes(place / ids[0] / name))
    stopped.pruned_file.write_text("behind by 0.3\n")
    return place, ids


def test_the_records_are_every_run_and_the_adapter_of_one_seed(folder, outputs, tmp_path):
    place, ids = outputs
    assert study.export_study(folder, place) == 3
    kept = folder / "runs"
    assert [(kept / name / "adapter").exists() for name in ids] == [True, False]
    runs, left_out = read_runs(run_roots([folder]))
    assert sorted(run.run_id for run in runs) == sorted(ids)
    assert [folder.reason for folder in left_out] == ["pruned by the search of a learning rate: behind by 0.3"]
    assert not (kept / ids[0].replace("-s0-", "-s8-")).exists(), "a run that only paused may go on"
    assert (kept / "sweeps" / "s-1" / "selection.json").exists()
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    study.export_study(folder, place)
    assert before == {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}, "a second export differs"
    # Another arm may have the same name.
    path = shutil.copytree(place, tmp_path / "here") / ids[1] / "result.json"
    record = storage.read_json(path)
    storage.write_json(path, record | {"identity": record["identity"] | {"warm": True}})
    study.export_study(folder, tmp_path / "here")
    assert [(kept / name / "adapter").exists() for name in ids] == [True, True]


def test_the_adapter_of_another_seed_is_kept_where_the_first_one_is_not_here(folder, outputs, tmp_path):
    place, ids = outputs
    shutil.copytree(place, tmp_path / "here")
    shutil.rmtree(tmp_path / "here" / ids[0] / "adapter")
    study.export_study(folder, tmp_path / "here")
    assert [(folder / "runs" / name / "adapter").exists() for name in ids] == [False, True]


def test_choices_that_were_scored_since_replace_the_kept_ones_and_fewer_do_not(folder, outputs, tmp_path):
    place, _ = outputs
    study.export_study(folder, place)
    shutil.copytree(place, tmp_path / "here")
    path, kept = (root / "sweeps" / "s-1" / "selection.json" for root in (tmp_path / "here", folder / "runs"))
    selection = read_selection(path)
    tested = [replace(choice, test=0.5, test_metric="exact_match_strict") for choice in selection.choices]
    for choices in (tested, []):
        write_selection(path, replace(selection, choices=choices))
        study.export_study(folder, tmp_path / "here")
        assert read_selection(kept).choices == tested


def test_a_study_continues_from_its_records_on_another_machine(folder, outputs, tmp_path, capsys):
    place, ids = outputs
    study.export_study(folder, place)
    kept = {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}
    elsewhere = tmp_path / "elsewhere"
    assert study.restore_study(folder, elsewhere) == 3
    assert study.restore_study(folder, elsewhere) == 0, "runs that are there stay"
    states = [RunFolder(path).state() for path in sorted(elsewhere.iterdir()) if path.name != "base"]
    assert states == ["done", "done", "pruned"]
    study.export_study(folder, elsewhere)
    assert kept == {path: path.read_bytes() for path in kept}, "an export of restored runs changes them"

    words = [f"outputs={elsewhere}", f"cache={place}/.cache", *WORDS]
    run.main(compose_config([*words, "seed=1"]))
    assert "finished before" in capsys.readouterr().out
    before = snapshot(elsewhere / ids[1])
    assert not (elsewhere / ids[1] / "adapter").exists()
    with pytest.raises(UserError, match=r"is a study's record without its adapter, which scores need; .*force=true"):
        run.main(compose_config([*words, "seed=1", "score.splits=[test]"]))
    assert snapshot(elsewhere / ids[1]) == before


def test_a_run_that_begins_while_the_records_are_copied_stays_as_it_is(folder, outputs, tmp_path, monkeypatch):
    place, ids = outputs
    study.export_study(folder, place)
    copyfile, begun = shutil.copyfile, RunFolder(tmp_path / "here" / ids[0])

    def copied_late(source, target):
        begun.checkpoints.mkdir(parents=True, exist_ok=True)
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", copied_late)
    assert study.restore_study(folder, tmp_path / "here") == 3 - 1
    assert [path.name for path in begun.path.iterdir()] == ["checkpoint"]
    assert not list((tmp_path / "here").glob(".*"))


def test_a_run_that_diverged_stays_a_result_on_another_machine(folder, outputs, tmp_path):
    place, ids = outputs
    here = tmp_path / "here"
    shutil.copytree(place, here)
    diverged = RunFolder(here / ids[0].replace("-s0-", "-s8-"))
    for name in ("config.yaml", "validation_losses.jsonl"):
        storage.write_bytes(diverged.path / name, storage.read_bytes(here / ids[0] / name))
    study.export_study(folder, here)
    diverged.error_file.write_text('Traceback\n  File "/home/me/x.py"\ntiedlora.errors.Diverged: step 3: nan\n')
    study.export_study(folder, here)
    kept = RunFolder(folder / "runs" / diverged.path.name)
    assert kept.error_file.read_text() == "tiedlora.errors.Diverged: step 3: nan\n"
    study.restore_study(folder, tmp_path / "there")
    restored = RunFolder(tmp_path / "there" / diverged.path.name)
    assert (restored.state(), restored.diverged()) == ("failed", True)
    # The run starts again. Its record is what ended it before, until it ends again.
    diverged.error_file.unlink()
    study.export_study(folder, here)
    assert kept.diverged()
    diverged.pruned_file.write_text("behind by 0.3\n")
    study.export_study(folder, here)
    assert (kept.state(), kept.diverged()) == ("pruned", False)


@pytest.mark.parametrize("file", ["config.yaml", "validation_losses.jsonl", "pruned.txt"])
def test_a_stopped_run_whose_export_was_killed_is_exported_again(file, folder, outputs, monkeypatch):
    place, ids = outputs
    kept, write = RunFolder(folder / "runs" / ids[0].replace("-s0-", "-s7-")), storage.write_bytes

    def killed(path, *arguments):
        if path == kept.path / file:
            raise KeyboardInterrupt
        write(path, *arguments)

    monkeypatch.setattr(storage, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        study.export_study(folder, place)
    monkeypatch.undo()
    study.export_study(folder, place)
    names = [path.name for path in sorted(kept.path.iterdir())]
    assert names == ["config.yaml", "pruned.txt", "validation_losses.jsonl"]


def test_scores_are_compressed_also_after_an_export_that_was_killed(folder, outputs, monkeypatch):
    place, _ = outputs

    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(gzip, "compress", killed)
    with pytest.raises(KeyboardInterrupt):
        study.export_study(folder, place)
    monkeypatch.undo()
    study.export_study(folder, place)
    files = [path for path in (folder / "runs").rglob("*.jsonl*") if path.parent.name in ("scores", "base")]
    assert {path.suffix for path in files} == {".gz"}


def test_a_finished_record_stays_while_its_run_is_trained_again(folder, outputs, tmp_path):
    place, ids = outputs
    study.export_study(folder, place)
    kept = {path: path.read_bytes() for path in (folder / "runs" / ids[1]).rglob("*") if path.is_file()}
    again = tmp_path / "again"
    study.restore_study(folder, again)
    (again / ids[1] / "result.json").unlink()
    losses = again / ids[1] / "validation_losses.jsonl"
    losses.write_text(losses.read_text().splitlines()[0] + "\n")
    study.export_study(folder, again)
    assert kept == {path: path.read_bytes() for path in (folder / "runs" / ids[1]).rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_signal_that_stops_a_study_lets_its_sweep_save_a_checkpoint(tiny_run):
    """The command of `run`, without the plan: it must be committed in the checkout of the tests."""
    words = tiny_run("seed=0", "train.steps=100000", "train.checkpoint_every=100000", "train.validate_every=0")
    (cell,) = compose_sweep(words).cells
    code = (
        "import sys; from tiedlora.commands.study import run_until_stopped; "
        "sys.exit(run_until_stopped([sys.executable, 'train.py', '--multirun', *sys.argv[1:]]))"
    )
    with processes.started([sys.executable, "-c", code, *words], cwd=PROJECT) as command:
        wait_until(cell.folder.metrics_file.exists)
        command.send_signal(signal.SIGTERM)
        assert command.wait(150) == 75
    assert cell.state() == "interrupted"
    assert cell.folder.checkpoint_step() > 0


def test_a_study_takes_the_runs_that_another_study_has_kept(folder, outputs, tmp_path):
    place, _ = outputs
    study.export_study(folder, place)
    study.restore_study(folder, tmp_path / "outputs")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "study.yaml").write_text(PLAN.replace("small", "other"))
    assert study.export_study(tmp_path / "other", tmp_path / "outputs") == 3
    first, second = map(snapshot, (folder / "runs", tmp_path / "other" / "runs"))
    assert {path: kept for path, kept in first.items() if not path.startswith("sweeps")} == second


def test_scores_that_a_restored_run_has_got_since_are_kept_without_texts(folder, outputs, tmp_path):
    place, _ = outputs
    study.export_study(folder, place)
    for name in ("outputs", "older"):
        study.restore_study(folder, tmp_path / name)
    (run,) = (RunFolder(path.parent) for path in (tmp_path / "outputs").glob("*/adapter"))
    kept = RunFolder(folder / "runs" / run.path.name)
    before = snapshot(folder / "runs")
    score_more(run, splits=["validation", "test"], drift=True)
    assert all(row.prompt for row in rows_of(run, "test"))
    for name in ("outputs", "older"):
        study.export_study(folder, tmp_path / name)
    after = snapshot(folder / "runs")
    assert {name: after[name] for name in before} == before, "a file that was there has changed"
    added = {name for name in after if name not in before}
    assert len(added) == 6, "the drift of validation, and three kinds of test with two of the base model"
    assert all(name.endswith(".jsonl.gz") for name in added)
    assert not any(row.prompt or row.references for row in rows_of(kept, "test"))
    with pytest.raises(UserError, match=r"is a study's record; copy it to outputs"):
        score_more(kept, splits=["test"], again=True)


def test_another_training_of_a_run_that_is_kept_is_left_out(folder, outputs, tmp_path, caplog):
    place, ids = outputs
    study.export_study(folder, place)
    before = snapshot(folder / "runs")
    shutil.copytree(place, tmp_path / "here")
    put(tmp_path / "here" / ids[0], "files", {"adapter/adapter.json": "0" * 64})
    study.export_study(folder, tmp_path / "here")
    assert snapshot(folder / "runs") == before
    assert f"{ids[0]}: is another training of the run that the study keeps" in caplog.text


@pytest.fixture
def command(script, outputs, monkeypatch):
    """Run scripts/study.py with the cache of the runs. Returns (exit code, output, errors)."""
    monkeypatch.setenv("TIEDLORA_CACHE", str(outputs[0] / ".cache"))
    return partial(script, "scripts/study.py")


def test_a_run_is_repeated_from_its_record_to_the_same_bytes(folder, outputs, command):
    place, ids = outputs
    study.export_study(folder, place)
    code, told, err = command("repeat", folder, ids[1], "--outputs", folder / "again")
    assert code == 0, err
    assert "adapter/adapter.safetensors: the same bytes" in told


@pytest.mark.parametrize(
    ("processor", "earlier", "loss", "code"),
    [("Another", None, 1.01, 0), ("Another", None, 1.2, 3), (None, None, 1.01, 3), (None, "Another", 1.0, 0)],
)
def test_on_another_processor_a_repeated_run_may_differ_by_rounding(
    folder, outputs, command, processor, earlier, loss, code
):
    """The run was trained on `processor`, up to some step on the one of `earlier`; None stands for this machine's."""
    place, ids = outputs
    study.export_study(folder, place)
    path = folder / "runs" / ids[1] / "result.json"
    record = json.loads(path.read_text())
    if earlier:
        part = {"step": 1, "code": record["code"], "versions": record["versions"]}
        record["training"]["continued_from"] = [{**part, "execution": {**record["execution"], "processor": earlier}}]
    record["execution"]["processor"] = processor or record["execution"]["processor"]
    record["training"]["validation_loss_last"] *= loss
    record["files"]["adapter/adapter.safetensors"] = "0" * 64
    path.write_text(json.dumps(record))
    ended, told, err = command("repeat", folder, ids[1], "--outputs", folder / "again")
    assert ended == code, err
    assert ("the same up to the rounding of another processor" in told) == (code == 0)
    assert (f", {earlier}, then cpu, " in told) == bool(earlier)


def test_all_runs_of_a_study_are_verified_at_once(folder, outputs, command):
    place, ids = outputs
    study.export_study(folder, place)
    code, told, err = command("verify", folder)
    assert code == 0, err
    assert told.splitlines()[-1] == "2 of 2 runs agree with their records"
    answers = folder / "runs" / ids[0] / "scores" / "validation.answers.jsonl"
    storage.write_compressed(answers, storage.read_content(answers) + b"\n")
    code, told, err = command("verify", folder)
    assert code == 3
    assert f"WRONG  {ids[0]}" in told
    assert told.splitlines()[-1] == "1 of 2 runs agree with their records"


@pytest.mark.slow
def test_a_forecast_adds_up_the_sweeps_and_counts_shared_cells_once(folder, script):
    plan = (folder / "study.yaml").read_text()
    # The third sweep has the cell of the first one again.
    (folder / "study.yaml").write_text(plan.replace("task=gsm_symbolic", "task=chain_sum, rank=r1"))
    words = ["train=tiny", "tracking=none", "train.threads=1", "--outputs", folder / "none"]
    code, out, err = script("scripts/study.py", "forecast", folder, *words)
    assert code == 0, err
    (row,) = [line for line in out.splitlines() if " chain_sum " in line]
    assert row.split()[2] == "3"


def test_a_mistake_in_the_words_of_a_forecast_is_not_said_of_the_plan_alone(folder, script):
    code, _, err = script("scripts/study.py", "forecast", folder, "train.stepz=3")
    assert code == 2
    assert "study.yaml: part first with train.stepz=3: train.stepz: unknown key (did you mean train.steps?)" in err
