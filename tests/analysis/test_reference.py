"""Published scores: a strict file, and matching to the runs that measure the same."""

import csv

import pytest
from helpers.report_runs import METRIC, scored_run
from matplotlib.axes import Axes

from tiedlora.analysis.groups import group_runs
from tiedlora.analysis.reference import published, read
from tiedlora.analysis.runs import read_runs
from tiedlora.config.project import PROJECT
from tiedlora.errors import UserError
from tiedlora.page import write

FILE = """\
source: A paper
link: https://example.org/paper
protocol: other data
scores:
  - {table: Table 1, model: org/tiny, task: chain_sum, metric: METRIC, configuration: TABuv, rank: 8, value: 0.25}
  - {table: Table 1, model: org/tiny, task: chain_sum, metric: METRIC, configuration: TABuv_v0, rank: 8, value: 0.5}
""".replace("METRIC", METRIC)
SCORE = FILE.splitlines()[4]


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "reference"
    place.mkdir()
    (place / "paper.yaml").write_text(FILE)
    return place


def test_the_files_of_the_project_are_read():
    """Each number has an address of a fixed state of its source."""
    scores = read(PROJECT / "reference")
    assert scores
    assert all("/tree/main" not in score.link and "/blob/main" not in score.link for score in scores)


def test_a_score_has_the_values_of_its_file(folder):
    first, second = read(folder)
    assert (first.source, first.split, first.value, second.configuration) == ("A paper", "test", 0.25, "TABuv_v0")
    assert first.note() == "published 25.0: A paper, Table 1 (other data), https://example.org/paper"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("link: https://example.org/paper\n", "", r"scores\[0\]: link: is missing"),
        ("https:", "http:", r"scores\[0\]: link='http://example.org/paper': String should match"),
        ("source: A paper", "source: ''", r"scores\[0\]: source='': String should have at least 1 character"),
        ("value: 0.25", "value: 25", r"scores\[0\]: value=25: Input should be less than or equal to 1"),
        ("value: 0.25", "value: .nan", r"scores\[0\]: value=nan: is not a finite number"),
        ("rank: 8, value: 0.5", "rank: 0, value: 0.5", r"scores\[1\]: rank=0: Input should be greater than or equal"),
        ("value: 0.5", "value: 0.5, split: train", r"scores\[1\]: split='train': Input should be 'test' or"),
        ("model: org/tiny", "model: ../tiny", r"scores\[0\]: model='../tiny': is '../tiny', which is no name"),
        ("value: 0.5", "value: 0.5, rang: 3", r"scores\[1\]: rang: unknown key \(did you mean rank\?\)"),
        ("protocol:", "remark: x\nprotocol:", r"scores\[0\]: remark: unknown key"),
        ("TABuv_v0", "TABuv", r"scores\[1\]: is about the same run as an earlier score"),
        (f"metric: {METRIC}", "metric: target_loss", r"scores\[0\]: 'target_loss' is a loss"),
        (SCORE, "  - 3", r"scores\[0\]: must be a mapping with the keys"),
        (FILE[FILE.index("scores:") :], "scores: []\n", "needs the key scores, a list of at least one"),
        (FILE, "a: ${oc.env:HOME}\n", "needs the key scores"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(folder, old, new, says):
    (folder / "paper.yaml").write_text(FILE.replace(old, new, 1))
    with pytest.raises(UserError, match=says) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: is not a folder"):
        read(tmp_path / "nowhere")


def test_only_the_same_measurement_matches(folder, tmp_path):
    """Base model, task, split, metric, configuration and rank."""
    outputs = tmp_path / "outputs"
    for about in (
        dict(name="TABuv", split="test"),
        dict(name="TABuv_v0", split="test"),
        dict(name="TABuv", split="test", rank=2),
        dict(name="LoRA", split="test"),
        dict(name="TABuv", split="test", task="gsm8k"),
        dict(name="TABuv", split="test", model="other/tiny"),
    ):
        scored_run(outputs, [1.0, 0.0] * 10, **about)
    scores, groups = read(folder), group_runs(read_runs([outputs])[0])
    assert len(groups) == 6
    matched = {(group.label, score.value) for group in groups for score in published(scores, group, "test", METRIC)}
    assert matched == {("TABuv", 0.25), ("TABuv_v0", 0.5)}
    assert not any(published(scores, group, "validation", METRIC) for group in groups)
    assert not any(published(scores, group, "test", "exact_match_flexible") for group in groups)


def test_the_report_shows_them_in_a_column_the_notes_and_the_figure(folder, tmp_path, monkeypatch):
    drawn = []
    scatter = Axes.scatter

    def recorded(ax, x, y, **more):
        drawn.append((x, y, more["facecolors"]))
        return scatter(ax, x, y, **more)

    monkeypatch.setattr(Axes, "scatter", recorded)
    for name in ("TABuv", "TABuv_v0", "LoRA"):
        scored_run(tmp_path / "outputs", [1.0, 0.0] * 10, name=name, split="test")
    report = write.build([tmp_path / "outputs"], published_in=folder)
    write.write(report, tmp_path / "report")
    assert set(drawn) == {(41_328, 25.0, "none"), (41_328, 50.0, "none")}
    with open(tmp_path / "report" / "results.csv", newline="", encoding="utf-8") as file:
        shown = {
            row["configuration"]: (row["published"], "https://example.org/paper" in row["notes"])
            for row in csv.DictReader(file)
        }
    assert shown == {"TABuv": ("25.0", True), "TABuv_v0": ("50.0", True), "LoRA": ("–", False)}


def test_a_claim_can_be_about_a_start(tmp_path):
    """`configuration: TABuv_v0` in a claims file finds the runs, although their ids begin with `custom`."""
    for name in ("TABuv", "TABuv_v0"):
        scored_run(tmp_path / "outputs", [1.0, 0.0] * 10, name=name)
    groups = group_runs(read_runs([tmp_path / "outputs"])[0])
    assert {group.label: group.runs[0].run_id.split("-")[0] for group in groups} == {
        "TABuv": "TABuv",
        "TABuv_v0": "custom",
    }
