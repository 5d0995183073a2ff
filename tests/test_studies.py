"""The studies: the tables of READMEs have the numbers of their records, and their records are small and clean."""

import json

import pytest

from tiedlora import storage
from tiedlora.config.compose import read_config
from tiedlora.config.identity import arm_of, run_id
from tiedlora.config.sizes import trainable_params
from tiedlora.config.trial_arm import own_values
from tiedlora.other_methods import FULL
from tiedlora.page import figures, readme, write
from tiedlora.places import PROJECT
from tiedlora.records.run_record import read_record
from tiedlora.records.study_files import RUNS, is_finished, records_folder
from tiedlora.sweeps.study import read_study

STUDIES = sorted(path.parent for path in (PROJECT / "studies").glob("*/study.yaml"))
SHOWN_IN_FRONT = "sharing-against-lora"
"""The study whose numbers the project's README has."""
LARGEST_BYTES = 65_000_000
"""Of all studies together: 26 MB of the first, 18 MB of sharing-against-lora, 0.3 MB of the third, and 16 MB of
does-it-hold."""
FINISHED = {"README.md", "appendix.md", "study.yaml", "claims.yaml", "control.yaml", "records.tar.xz"}
"""The files of a finished study. control.yaml is a second file of claims, which compares LoRA with itself."""


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_every_table_has_the_numbers_of_the_records_which_have_a_clean_commit_and_no_texts(folder):
    assert read_study(folder).name == folder.name
    records = records_folder(folder)
    if not (records / RUNS).is_dir():
        pytest.skip("no run yet")
    report = write.build([folder], claims=folder / "claims.yaml")
    for page in (folder / "README.md", *([PROJECT / "README.md"] if folder.name == SHOWN_IN_FRONT else [])):
        text = page.read_text()
        assert readme.filled(text, report) == text, f"{page}: write it with scripts/report.py {folder} --readme"
    for run in report.runs:
        assert all(code.dirty is False for code in run.record.code_versions), run.run_id
        assert not run.record.keeps_texts, run.run_id
        assert run.record.config.tree["data_root"] is None, run.run_id
    for path in [*records.glob("r*/*/scores/*"), *records.glob("r*/base/*")]:
        _, *lines = storage.read_content(path.with_name(path.name.removesuffix(".gz"))).splitlines()
        assert all(b'"prompt": "", ' in line and b'"references": [], ' in line for line in lines), path


def test_an_arm_has_one_label_size_and_style_from_its_configuration_and_from_its_record():
    """Every arm of the studies once. A run without a result has only its configuration."""
    records = {}
    for path in (path for folder in STUDIES for path in records_folder(folder).glob("r*/*/result.json")):
        tree = storage.read_json(path)
        records.setdefault(json.dumps([own_values(tree["identity"]), tree["config"]["tying"]["name"]]), path)
    shorts = set()
    for path in records.values():
        record, config = read_record(path), read_config(path.parent / "config.yaml")
        arm, own = record.arm, arm_of(config)
        assert own == arm
        assert (own.label, own.short, own.word) == (arm.label, arm.short, arm.word)
        assert figures.style(own) == figures.style(arm)
        # All weights of a model are counted when it is loaded.
        known = None if config.tying.method == FULL else record.trainable_params
        assert trainable_params(config) == known
        assert record.trainable_params == (arm.params or record.trainable_params)
        assert record.run_id == run_id(config) == path.parent.name
        shorts.add(arm.short)
    assert shorts >= {"LoRA r 1, 22 layers", "LoRA r 8 (shuffled targets)", "TA r 8 (reward)", "peft/tinylora (reward)"}


def test_the_studies_are_small():
    for folder in STUDIES:
        assert not is_finished(folder) or {path.name for path in folder.iterdir()} <= FINISHED
    assert sum(path.stat().st_size for path in (PROJECT / "studies").rglob("*") if path.is_file()) < LARGEST_BYTES
