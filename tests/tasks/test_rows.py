"""The sources of rows: the hub, the official zip of IWSLT 2017, and local files that fetch_data.py writes."""

import codecs
import datetime
import hashlib
import json
import math
import time
import zipfile
from dataclasses import replace

import pytest
from helpers.task_rows import FIVE, GOOD, one_example, task_option
from helpers.tiny import task_option as compose_task
from omegaconf import OmegaConf

from tiedlora import storage
from tiedlora.commands.fetch_data import main as fetch
from tiedlora.config.schema import SPLITS
from tiedlora.errors import UserError
from tiedlora.places import PROJECT
from tiedlora.tasks import Task, digest, load_examples
from tiedlora.tasks.generated import worked_sum
from tiedlora.tasks.rows import DataRow


@pytest.mark.parametrize("kind", FIVE)
def test_a_missing_source_and_a_fetch_without_the_hub_are_one_line_with_three_ways(kind, tmp_path):
    with pytest.raises(UserError, match=r"Three ways .*fetch_data.*data_root=FOLDER") as missing:
        load_examples(task_option(kind), "train", str(tmp_path))
    with pytest.raises(UserError, match=f"task={kind}: .* cannot be loaded .*Three ways") as unreachable:
        fetch([f"task={kind}", f"data_root={tmp_path}/data"])
    assert "\n" not in f"{missing.value}{unreachable.value}"
    assert not (tmp_path / "data").exists()


def test_fetch_writes_what_training_reads(tmp_path, monkeypatch):
    more = {"asked": datetime.date(2026, 1, 2), "weight": math.nan}
    monkeypatch.setattr(Task, "hub_rows", lambda _self, _split: [DataRow("hub", {**GOOD["squad"], **more})])
    fetch(["task=squad", f"data_root={tmp_path}"])
    (example,) = load_examples(task_option("squad", "task.rows.validation=1"), "validation", str(tmp_path))
    assert example == replace(one_example("squad", GOOD["squad"]), id="q1", cluster="Rome")


def test_fetch_replaces_no_file_that_has_other_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("TIEDLORA_DATA", str(tmp_path))
    held = {"train": "1", "validation": "2", "test": "5"}
    monkeypatch.setattr(Task, "hub_rows", lambda _self, split: [DataRow("hub", {"id": held[split]})])
    fetch(["task=squad"])
    files = [tmp_path / "squad" / f"{split}.jsonl" for split in held]
    before = [(file.stat().st_mtime_ns, file.read_text()) for file in files]
    fetch(["task=squad"])
    held |= {"train": "3", "validation": "4"}
    files[0].unlink()
    with pytest.raises(
        UserError, match=r"validation\.jsonl: is there with other rows; remove it, or give another fold"
    ):
        fetch(["task=squad"])
    assert not files[0].exists(), "all files are of one download"
    assert (files[1].stat().st_mtime_ns, files[1].read_text()) == before[1]


def test_fetch_picks_the_rows_of_a_study_in_their_order(tmp_path, monkeypatch):
    listed = json.loads((PROJECT / "studies" / "rows" / "squad.json").read_text())
    names = {split: [hashlib.sha256(f"{split}{i}".encode()).hexdigest()[:12] for i in (2, 0)] for split in SPLITS}
    (tmp_path / "rows.json").write_text(json.dumps({**listed, "splits": names}))
    held = {"train": "train", "validation": "test", "test": "validation"}
    monkeypatch.setattr(Task, "hub_rows", lambda _, s: [DataRow("", {"id": f"{held[s]}{i}"}) for i in range(3)])
    fetch(["task=squad", f"data_root={tmp_path}", "--rows", f"{tmp_path}/rows.json"])
    with pytest.raises(UserError, match="has rows of task=squad, not of gsm8k"):
        fetch(["task=gsm8k", f"data_root={tmp_path}", "--rows", f"{tmp_path}/rows.json"])
    assert (tmp_path / "squad" / "test.jsonl").read_text() == '{"id": "test2"}\n{"id": "test0"}\n'


def test_files_of_editors_on_windows_are_read_as_any_other(tmp_path):
    """They may begin with a byte order mark, and end lines with two characters. Joined files have a mark inside."""
    mark = codecs.BOM_UTF8
    row, other = ({**GOOD["gsm8k"], "question": f"How many {what}?"} for what in ("äpfel", "\ufeff"))
    lines = [json.dumps(one, ensure_ascii=False).encode() for one in (row, other)]
    for name, data in (("plain", b"\n".join(lines)), ("windows", b"".join(mark + line + b"\r\n" for line in lines))):
        (tmp_path / name / "gsm8k").mkdir(parents=True)
        (tmp_path / name / "gsm8k" / "test.jsonl").write_bytes(data)
    (tmp_path / "claims.yaml").write_bytes(mark + b"claims:\r\n- name: x\r\n")
    plain, windows = (
        load_examples(task_option("gsm8k"), "test", str(tmp_path / folder)) for folder in ("plain", "windows")
    )
    assert digest(windows) == digest(plain)
    # A mark that is no file's first character is part of the text.
    assert "\ufeff" in windows[1].prompt
    # Claims, plans of studies and published scores are read so.
    assert storage.read_yaml(tmp_path / "claims.yaml") == {"claims": [{"name": "x"}]}


@pytest.mark.parametrize(
    "text",
    ["3e-2", "-3e-2", "+3E+2", ".5e-2", "-.5e-2", "1_0e2", "1.e5", "-1.5", "010", "2020-01-01", "3e", "1e-2 is best"],
)
def test_a_number_of_yaml_is_what_hydra_would_read(text, tmp_path):
    (tmp_path / "claims.yaml").write_text(f"value: {text}\n")
    found = storage.read_yaml(tmp_path / "claims.yaml")["value"]
    expected = OmegaConf.load(tmp_path / "claims.yaml").value
    assert (type(found), found) == (type(expected), expected)


def test_a_key_of_yaml_stands_once_and_many_keys_take_no_time(tmp_path):
    (tmp_path / "claims.yaml").write_text("'': 1\n'': 2\n")
    with pytest.raises(UserError, match="the key '' stands twice"):
        storage.read_yaml(tmp_path / "claims.yaml")
    (tmp_path / "claims.yaml").write_text("".join(f"k{number}: 1\n" for number in range(40_000)))
    started = time.monotonic()
    assert len(storage.read_yaml(tmp_path / "claims.yaml")) == 40_000
    # A comparison of each key with each other one took half a minute.
    assert time.monotonic() - started < 15


def test_iwslt_pairs_come_out_of_the_official_zip(tmp_path, monkeypatch):
    train = {
        "de": "<url>x</url>\n<title>T</title>\n Guten Tag. \n\nEins &amp; zwei\n<reviewer></reviewer>\n",
        "en": "<url>x</url>\n<title>T</title>\n Good day. \nLeft over\nOne &amp; two\n<reviewer></reviewer>\n",
    }
    xml = '<mteval><refset><doc docid="1"><seg id="1"> {} </seg>\n<seg id="2">A &amp;\nB</seg></doc></refset></mteval>'
    path = tmp_path / "de-en.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for language, hello in (("de", "Hallo"), ("en", "Hello")):
            archive.writestr(f"de-en/train.tags.de-en.{language}", train[language])
            for name in ("tst2010", "tst2012"):
                archive.writestr(f"de-en/IWSLT17.TED.{name}.de-en.{language}.xml", xml.format(f"{hello} {name}"))
        archive.writestr("de-en/IWSLT17.TED.tst2011.de-en.de.xml", xml.format("Hallo"))
        archive.writestr("de-en/IWSLT17.TED.tst2011.de-en.en.xml", "<seg>one</seg>")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_arguments, **_keywords: str(path))

    def pairs(split, sets):
        task = compose_task("iwslt2017", f"task.hub.splits.{split}={sets}")
        return [tuple(row.fields["translation"].values()) for row in task.hub_rows(split)]

    assert pairs("train", "train") == [("Guten Tag.", "Good day."), ("Eins &amp; zwei", "One &amp; two")]
    rest = ("A &\nB", "A &\nB")
    assert pairs("test", "tst2010+tst2012") == [
        ("Hallo tst2010", "Hello tst2010"),
        rest,
        ("Hallo tst2012", "Hello tst2012"),
        rest,
    ]
    with pytest.raises(UserError, match="tst2011 has 2 German and 1 English"):
        pairs("test", "tst2011")
    with pytest.raises(UserError, match=r"holds no IWSLT17\.TED\.tst2019"):
        pairs("test", "tst2019")


def test_a_generated_question_is_in_one_split_and_comes_once():
    task = task_option("chain_sum", "task.options.rows={train: 2000, validation: 200, test: 200}")
    questions = [row["question"] for split in SPLITS for row in task.generated_rows(split)]
    assert len(set(questions)) == len(questions) < 2400, "reasoning-gym has made some of them twice"
    assert worked_sum("35 + 94 - 16") == "35 + 94 = 129\n129 - 16 = 113\n"
