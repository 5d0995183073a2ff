"""task=rows: files, templates and metrics by name; what is cut from one file."""

import csv
import json
import os
import re
import shlex
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from helpers.hostile import refused
from helpers.task_rows import GOOD, TINY, WORDS, one_example
from helpers.task_rows import task_option as built_in
from helpers.tiny import folder_of, rows_of, saved_tiny, tiny

from tiedlora import storage
from tiedlora.commands.fetch_data import main as fetch
from tiedlora.config import compose
from tiedlora.config.identity import config_tree, run_id
from tiedlora.config.schema import SCORED_SPLITS, SPLITS
from tiedlora.data.encoding import Encoder
from tiedlora.errors import UserError
from tiedlora.export.study_records import export_record
from tiedlora.places import PROJECT
from tiedlora.records.provenance import git
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs.verify import verify
from tiedlora.tasks import Example, Task, load_examples, load_task
from tiedlora.tasks.own_rows import OwnRows
from tiedlora.tasks.rows import DataRow, RowError

ROWS = [{"text": f'Say "{n}", please', "topic": f"topic {n % 7}", "page": f"p{n // 4}"} for n in range(40)]


def write_table(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own_task(*overrides: str) -> Task:
    task = load_task(compose.compose_config([*WORDS, *overrides]).task)
    task.check_options()
    return task


def one(row: dict, *overrides: str) -> Example:
    return own_task(*overrides).example(DataRow("here", row), "0")


@pytest.fixture
def tickets(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_table(tmp_path / "tickets.csv", ROWS)


# A run.


PAGE = (PROJECT / "docs" / "own.md").read_text()


def page_commands(heading: str, script: str) -> list[list[str]]:
    """The words of the commands with this script below a heading of docs/own.md."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [shlex.split(words) for words in re.findall(rf"^    python {script} (.*)$", section, re.MULTILINE)]


def test_the_command_of_the_page_trains_scores_and_verifies_and_leaves_the_code_clean(tickets, tmp_path, script):
    (command,) = page_commands("Your rows", "train.py")
    before = git("status", "--porcelain")
    words = [*command, *TINY, "outputs=outputs", "cache=cache", "score.splits=[validation,test]"]
    code, out, _ = script("train.py", *words)
    assert (code, "exact_match" in out) == (0, True)
    assert git("status", "--porcelain") == before
    (result,) = (tmp_path / "outputs").glob("*/result.json")
    folder, record = RunFolder(result.parent), json.loads(result.read_text())
    assert record["data"]["train"]["rows"] == 32
    assert [len(rows_of(folder, split)) for split in SCORED_SPLITS] == [4, 4]
    assert rows_of(folder, "test")[0].prompt.endswith(", please\nTopic:")

    findings = {finding.check: finding for finding in verify(folder.path, rows=4)}
    assert [finding for finding in findings.values() if finding.ok is False] == []
    assert findings["data train"].ok
    assert findings["data test"].ok
    # The run has moved to another machine, where the file is in another folder.
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tickets, tmp_path / "elsewhere" / "tickets.csv")
    moved = {finding.check: finding for finding in verify(folder.path, rows=0)}
    assert moved["data train"].ok is None
    moved = {finding.check: finding for finding in verify(folder.path, rows=0, data_root=str(tmp_path / "elsewhere"))}
    assert moved["data train"].ok
    # A changed file is named, although this change is of no prompt.
    write_table(tickets, [*ROWS[:-1], {**ROWS[-1], "page": "other"}])
    changed = {finding.check: finding for finding in verify(folder.path, rows=0)}
    assert changed["data test"].ok is False
    says = f"{tickets}: is another file than that of the run's id"
    assert says in changed["data test"].explanation
    code, _, err = script("scripts/score.py", folder.path, "--split", "validation", "--again")
    assert (code, says in err) == (2, True)


@pytest.mark.slow
@pytest.mark.usefixtures("tickets")
def test_the_commands_of_the_page_compare_an_own_model_on_own_rows_with_lora(tmp_path, script):
    saved_tiny("tiny_llama", tmp_path / "my-model")
    (option,) = re.findall(r"^```yaml\n(# (conf/task/\w+\.yaml)\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / option[1]).parent.mkdir(parents=True)
    (tmp_path / option[1]).write_text(option[0])
    heading = "Both together, compared with LoRA"
    (sweep,) = page_commands(heading, "train.py")
    code, _, err = script("train.py", *sweep, *TINY[1:], "outputs=outputs", "cache=cache", "tracking=none")
    assert code == 0, err
    assert len([*tmp_path.glob("outputs/*/result.json")]) == 6
    (report,), (sides,) = (page_commands(heading, f"scripts/{name}.py") for name in ("report", "compare"))
    assert script("scripts/report.py", *report)[0] == 0
    assert (tmp_path / "report" / "index.html").is_file()
    # The shell does what glob does.
    words = [path for word in sides for path in (sorted(tmp_path.glob(word)) if "*" in word else [word])]
    code, out, err = script("scripts/compare.py", *words)
    assert (code, "exact_match" in out) == (0, True), err


def test_the_cells_of_a_sweep_hash_a_file_once(tickets, tmp_path, monkeypatch):
    os.utime(tickets, (1, 1))
    hashed, whole = [], storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda path: hashed.append(path) or whole(path))
    for seed in range(3):
        compose.compose_config([*WORDS, f"task.files={tickets}", f"cache={tmp_path}/cache", f"seed={seed}"])
    assert hashed == [tickets]


def test_the_id_has_the_rows_and_not_their_place(tickets, tmp_path):
    def id_of(*overrides, file=tickets):
        return run_id(compose.compose_config([*WORDS, f"task.files={file}", *overrides]))

    (tmp_path / "there").mkdir()
    copied = shutil.copy(tickets, tmp_path / "there" / "other.csv")
    assert id_of(file=copied) == id_of() == id_of(f"task.files={{train: {tickets}}}")
    assert id_of("task.prompt='{text}\nTopic:'") == id_of(), "\\n is a line feed"
    others = {
        "task.metrics=[token_f1]",
        "task.normalise=lower",
        "task.choices=[a,b]",
        "task.split_seed=1",
        "task.cluster=page",
        f"task.files={{train: {tickets}, test: {copied}}}",
        "task.target={topic}".replace("{topic}", "'{topic}'"),
    }
    write_table(tmp_path / "there" / "more.csv", ROWS[:-1])
    ids = {*map(id_of, others), id_of(file=tmp_path / "there" / "more.csv")}
    assert len(ids - {id_of()}) == len(others) + 1
    # If no split is cut, the cluster changes intervals only, as for other tasks.
    given = f"task.files={{train: {tickets}, validation: {copied}, test: {copied}}}"
    assert id_of(given) == id_of(given, "task.cluster=page")


@pytest.mark.usefixtures("tickets")
def test_the_recorded_command_gives_the_same_run_and_a_published_one_has_no_folder(tmp_path, finish):
    config = compose.compose_config(
        [*WORDS, *TINY, "task.files=tickets.csv", "task.name=tickets", "task.cluster=page", "score.splits=[]"]
    )
    again = compose.command(config)
    assert "task.files.train=" in again
    assert str(tmp_path) not in again
    assert not again.endswith(compose.NOT_EXACT)
    assert run_id(compose.compose_config(shlex.split(again)[2:])) == run_id(config)

    config = replace(config, outputs=str(tmp_path / "outputs"), cache=str(tmp_path / "cache"))
    finish(config)
    exported = export_record(folder_of(config), tmp_path / "published")
    published = exported.config_file.read_text() + exported.result_file.read_text()
    assert "train: tickets.csv" in published
    assert str(tmp_path) not in published


def test_the_id_has_the_rows_of_a_data_root_too(tmp_path):
    roots = [tmp_path / name for name in ("one", "copy", "other")]
    for root, rows in zip(roots, (ROWS, ROWS, ROWS[1:]), strict=True):
        (root / "rows").mkdir(parents=True)
        write_lines(root / "rows" / "train.jsonl", rows)
    configs = [compose.compose_config([*WORDS, f"data_root={root}"]) for root in roots]
    ids = [run_id(config) for config in configs]
    assert ids[0] == ids[1] != ids[2]
    write_lines(roots[0] / "rows" / "train.jsonl", ROWS[1:])
    with refused("is another file than that of the run's id"):
        load_examples(load_task(configs[0].task), "train", str(roots[0]))


def test_a_record_of_before_is_read_as_it_is(tmp_path):
    """It has no sha256 of rows below data_root, and `\\n` in a template of a built-in task."""
    (tmp_path / "rows").mkdir()
    write_lines(tmp_path / "rows" / "train.jsonl", ROWS)
    tree = config_tree(compose.compose_config([*WORDS, f"data_root={tmp_path}"]))
    tree["task"] |= {"rows_from": {}, "prompt": "$\\nabla$ {text}"}
    storage.write_yaml(tmp_path / "config.yaml", tree)
    assert compose.read_finished_config(tmp_path / "config.yaml", tree).task.prompt == "$\\nabla$ {text}"


def test_a_moved_run_finds_files_of_one_name_by_their_folders(tmp_path):
    for part, rows in (("tr", ROWS[:30]), ("te", ROWS[30:])):
        (tmp_path / "here" / part).mkdir(parents=True)
        write_lines(tmp_path / "here" / part / "data.jsonl", rows)
    here, there = tmp_path / "here", tmp_path / "there"
    config = compose.compose_config(
        [*WORDS, f"task.files={{train: {here}/tr/data.jsonl, test: {here}/te/data.jsonl}}"]
    ).task
    before = [load_examples(load_task(config), split, None) for split in SPLITS]
    shutil.move(here, there)
    assert [load_examples(load_task(config), split, str(there)) for split in SPLITS] == before


# Files.


def test_all_kinds_of_files_give_the_same_examples(tmp_path):
    rows = [
        {**row, "text": f"{row['text']}\nof two lines", "n": "007", "none": "NA", "date": "2026-01-02"} for row in ROWS
    ]
    write_table(tmp_path / "a.csv", rows)
    write_table(tmp_path / "a[1] b.tsv", rows, "\t")
    write_lines(tmp_path / "a.jsonl", rows)
    # As Excel writes it.
    (tmp_path / "a8.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a[1] b.parquet")
    words = ("task.prompt='{text} {n} {none} {date}'", "task.stop=[]")
    found = [load_examples(own_task(f"task.files='{path}'", *words), "train", None) for path in tmp_path.glob("a*")]
    assert len(found) == 5
    assert found[0][0].prompt.endswith("of two lines 007 NA 2026-01-02")
    assert all(examples == found[0] for examples in found)


@pytest.mark.parametrize("empty", [None, float("nan"), "", " "])
def test_rows_with_an_empty_cluster_stand_alone_in_splits_and_in_intervals(tmp_path, empty):
    pages = ["p1", "p1", "p2", "p2", *[empty] * 16]
    rows = [{"text": f"text {n}", "topic": "a", "page": page} for n, page in enumerate(pages)]
    task = own_task(f"task.files={write_lines(tmp_path / 'a.jsonl', rows)}", "task.cluster=page")
    splits = {split: load_examples(task, split, None) for split in SPLITS}
    # A tenth of 18 groups: the rows of p1, those of p2, and 16 single ones.
    assert len(splits["train"]) >= 20 - 2 * 2
    assert sorted(e.cluster for examples in splits.values() for e in examples) == [*[""] * 16, "p1", "p1", "p2", "p2"]


def test_one_file_is_cut_by_a_seed_and_no_prompt_and_no_cluster_is_in_two_splits(tmp_path):
    # Every third row has the prompt of another one.
    rows = [{**row, "text": "again" if n % 3 == 0 and n < 9 else row["text"]} for n, row in enumerate(ROWS)]
    path = write_table(tmp_path / "a.csv", [*rows, *rows[5:9]])

    def cut(*overrides):
        task = own_task(f"task.files={path}", *overrides)
        return {split: load_examples(task, split, None) for split in SPLITS}

    for overrides in ((), ("task.cluster=page",), ("task.cluster=page", "task.split_seed=1")):
        splits = cut(*overrides)
        assert sum(map(len, splits.values())) == len(rows) + 4
        assert min(map(len, splits.values())) > 0
        prompts = [example.prompt for split in splits.values() for example in {e.prompt: e for e in split}.values()]
        assert len(prompts) == len({*prompts})
        clusters = [cluster for split in splits.values() for cluster in {e.cluster for e in split} - {""}]
        assert len(clusters) == len({*clusters})
        assert cut(*overrides) == splits
    assert cut("task.split_seed=1") != cut()
    assert len({e.prompt for e in cut("task.validation_from_train=9")["validation"]}) == 9


def test_validation_is_cut_from_train_if_only_the_test_rows_are_given(tmp_path):
    train, test = write_lines(tmp_path / "a.jsonl", ROWS[:30]), write_lines(tmp_path / "b.jsonl", ROWS[30:])
    task = own_task(f"task.files={{train: {train}, test: {test}}}")
    assert [len(load_examples(task, split, None)) for split in SPLITS] == [27, 3, 10]
    task = own_task(f"task.files={{train: {train}, validation: {test}}}", "task.validation_from_train=5")
    with pytest.raises(UserError, match=r"^task\.validation_from_train=5: changes nothing"):
        load_examples(task, "train", None)


def test_rows_of_the_hub_need_its_id_alone_and_trained_rows_that_are_scored_are_left_out(tmp_path, monkeypatch):
    """`datasets` takes a folder for an id."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    for split, part in (("train", ROWS[:20]), ("test", ROWS[15:30])):
        write_lines(tmp_path / "org" / "name" / f"{split}.jsonl", part)
    monkeypatch.chdir(tmp_path)
    config = compose.compose_config([*WORDS, "task.hub.id=org/name", "task.validation_from_train=5"]).task
    splits = {split: load_examples(load_task(config), split, None) for split in SPLITS}
    scored = {example.prompt for split in SCORED_SPLITS for example in splits[split]}
    assert [len(splits[split]) for split in SCORED_SPLITS] == [5, 15]
    assert len(splits["train"]) == 20 - len({row["text"] for row in ROWS[:20] if f"{row['text']}\nTopic:" in scored})
    prompts = [example.prompt for examples in splits.values() for example in examples]
    assert len({*prompts}) == len(prompts)
    assert config.rows_from == {"hub": "org/name  main"}

    words = [*WORDS, "task.hub.id=org/name", "task.validation_from_train=5", f"data_root={tmp_path}/data"]
    fetch(words)
    # Another data set is not taken for it.
    own = load_task(compose.compose_config([*words, "task.hub.id=org/other"]).task)
    with pytest.raises(UserError, match=r"org/other cannot be loaded .* task\.hub\.id=org/other data_root=FOLDER"):
        load_examples(own, "train", f"{tmp_path}/data")
    shutil.rmtree(tmp_path / "org")
    assert {split: load_examples(load_task(config), split, f"{tmp_path}/data") for split in SPLITS} == splits


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        ({"topic": "-1"}, ["task.choices=[topic 0,topic 1,topic 2]", "task.metrics=[choice_accuracy]"]),
        ({"topic": ""}, []),
        ({"topic": None}, []),
        ({}, ["task.messages=m", "task.prompt=''", "task.target=''"]),
    ],
)
def test_rows_of_the_hub_whose_answers_are_hidden_are_compared_and_not_scored(hidden, words, monkeypatch):
    task = own_task("task.hub.id=org/name", "task.hub.splits={train: train, validation: dev, test: test}", *words)
    rows = {}
    for split, numbers in {"train": range(9), "validation": range(8, 12), "test": range(7, 12)}.items():
        asked = [{"m": [{"role": "user", "content": f"t{n}"}], "text": f"t{n}"} for n in numbers]
        answer = [{"role": "assistant", "content": "a"}]
        rows[split] = [{**row, "m": row["m"] + answer, "topic": "topic 1"} for row in asked]
    rows["test"] = [{**row, "m": row["m"][:1], **hidden} for row in rows["test"]]
    monkeypatch.setattr(OwnRows, "hub_rows", lambda _, split: [DataRow(split, row) for row in rows[split]])
    assert len(load_examples(task, "train", None)) == 7
    assert len(load_examples(task, "validation", None)) == 4
    with pytest.raises(UserError, match=r"^test: "):
        load_examples(task, "test", None)


@pytest.mark.parametrize("from_hub", [True, False], ids=["hub", "file"])
def test_a_class_has_its_name_and_pictures_and_sounds_stay_encoded(from_hub, tmp_path, monkeypatch):
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "topic": datasets.ClassLabel(names=["neg", "pos"]),
            "picture": datasets.Image(),
            "sounds": datasets.List(datasets.Audio()),
            "film": {"film": datasets.Video()},
        }
    )
    film = {"bytes": b"no film", "path": None}
    more = {"picture": film, "sounds": [film], "film": {"film": film}}
    rows = [{"text": f"t{n}", "topic": topic, **more} for n, topic in enumerate([1, 0, -1, None])]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "org" / "name" / "train.parquet"
    path.parent.mkdir(parents=True)
    # To write them with `datasets` would need the packages that decode.
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=features.arrow_schema), path)
    choices = ("task.choices=[pos,neg]", "task.metrics=[choice_accuracy]")
    task = own_task("task.hub.id=org/name" if from_hub else f"task.files={path}", *choices)
    found = task.rows("train", None)
    assert [row["topic"] for row in found] == ["pos", "neg", None, None]
    assert [row["picture"] for row in found] == [film] * 4
    assert [task.example(row, "").references for row in found[:2]] == [("0",), ("1",)]


# Templates, choices, messages and metrics.


def test_templates_are_those_of_str_format_and_read_nothing_but_fields():
    row = {"a b": "{x}", "x.y-z": 5, "t": "target"}
    example = one(row, "task.prompt='{a b}{{{x.y-z}}}'", "task.target='{t}'")
    assert (example.prompt, example.target, example.references) == ("{x}{5}", "target", ("target",))


def test_choices_are_a_list_columns_or_a_column_with_a_list():
    metrics = "task.metrics=[choice_accuracy]"
    columns = ("task.choices=['{a}','{b}']", metrics)
    row = {"text": "x", "topic": "no", "a": "yes", "b": " no ", "both": ["yes", "no"]}
    examples = [
        one(row, *words) for words in (columns, ("task.choices=[yes,no]", metrics), ("task.choices=both", metrics))
    ]
    assert {example.choices for example in examples} == {(" yes", " no")}
    assert {(example.target, example.references) for example in examples} == {(" no", ("1",))}
    numbered = one({**row, "topic": 0}, *columns)
    assert (numbered.target, numbered.references) == (" yes", ("0",))
    # The text of a choice comes before its number.
    assert one({**row, "topic": "0"}, "task.choices=[1,0]", metrics).references == ("1",)
    assert one({**row, "topic": "3"}, "task.choices=[1,2,3]", metrics).references == ("2",)
    # But numbers in a column may be either.
    with pytest.raises(RowError, match="which is the text of choice 1 and the number of choice 2"):
        one({**row, "topic": 2, "both": ["8", "2", "24"]}, "task.choices=both", metrics)
    assert one({**row, "topic": 24, "both": [8, 2, 24]}, "task.choices=both", metrics).target == " 24"


def test_rows_go_by_their_numbers_if_an_id_is_empty_or_repeats(tmp_path):
    empty = write_lines(tmp_path / "empty.jsonl", [{"id": n or "", **row} for n, row in enumerate(ROWS)])
    assert {e.id for e in load_examples(own_task(f"task.files={empty}"), "train", None)} < {*map(str, range(40))}
    rows = [{"id": number % 9, **row} for number, row in enumerate(ROWS)]
    paths = {split: write_lines(tmp_path / f"{split}.jsonl", rows) for split in ("repeated", "other")}
    write_lines(paths["other"], [{"id": f"row {number}", "text": f"t{number}", "topic": "a"} for number in range(3)])
    whole = own_task(f"task.files={{train: {paths['repeated']}, validation: {paths['other']}}}")
    assert [example.id for example in load_examples(whole, "train", None)] == [str(number) for number in range(40)]
    assert [example.id for example in load_examples(whole, "validation", None)] == ["row 0", "row 1", "row 2"]
    cut = own_task(f"task.files={paths['repeated']}")
    parts = {split: load_examples(cut, split, None) for split in SPLITS}
    assert sorted(example.prompt for part in parts.values() for example in part) == sorted(
        example.prompt for example in load_examples(whole, "train", None)
    )


def test_a_column_without_a_name_ties_no_rows(tmp_path):
    """A line that ends in a comma, or an index of pandas."""
    path = write_table(tmp_path / "a.csv", [{**row, "": "0"} for row in ROWS])
    assert len(load_examples(own_task(f"task.files={path}"), "train", None)) > len(ROWS) / 2


def test_a_prompt_in_two_splits_is_refused_however_it_is_stored(tmp_path):
    texts = ("caf\u00e9\nline", "cafe\u0301\r\nline", "other")
    paths = [write_table(tmp_path / f"{n}.csv", [{"text": t, "topic": "a"}]) for n, t in enumerate(texts)]
    task = own_task(f"task.files={{train: {paths[0]}, test: {paths[1]}, validation: {paths[2]}}}")
    with pytest.raises(UserError, match="so it is in test and in train; remove it from one"):
        load_examples(task, "train", None)


def test_a_number_of_32_bits_has_the_digits_that_were_written(tmp_path):
    path = tmp_path / "a.parquet"
    prices = pyarrow.array([19.99, None], pyarrow.float32())
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"], "topic": prices}), path)
    rows = own_task(f"task.files={path}").rows("train", None)
    assert [row["topic"] for row in rows] == [19.99, None]


def test_a_line_feed_of_a_shell_ends_an_answer_and_a_target_cannot_begin_with_its_end():
    built_in = compose.compose_config(["task=gsm8k", 'task.prompt="Q: {question}\\nA:"', 'task.stop=["\\n\\n"]'])
    assert (built_in.task.prompt, built_in.task.stop) == ("Q: {question}\nA:", ["\n\n"])
    assert run_id(compose.compose_config(shlex.split(compose.command(built_in))[2:])) == run_id(built_in)
    assert own_task('task.stop=["\\n\\n"]').config.stop == ["\n\n"]
    with pytest.raises(RowError, match="the target holds '###', at which an answer ends"):
        one({"text": "x", "topic": "### Title"}, 'task.stop=["###"]')


def test_scores_are_those_of_the_built_in_tasks():
    words = ("task.prompt='{q}'", "task.target=' {a}'")
    texts = [("The Romulus!", "Romulus"), ("nothing", "Romulus"), ("a cat sat", "the cat sat down")]
    generated = own_task(
        "task.metrics=[exact_match,token_f1,rouge1,rouge2,rougeL,bleu,chrf]", "task.normalise=squad", *words
    )
    for output, reference in texts:
        example = Example("", "", "", (f" {reference}",))
        scores = generated.score(output, example)
        squad, rouges, corpus = (built_in(name).score(output, example) for name in ("squad", "dialogsum", "iwslt2017"))
        assert scores == {"exact_match": squad["exact_match"], "token_f1": squad["f1"], **rouges, **corpus}
        assert generated.total("chrf", [corpus["chrf"]]) == built_in("iwslt2017").total("chrf", [corpus["chrf"]])
    theirs = built_in("dialogsum").signatures() | built_in("iwslt2017").signatures()
    assert generated.signatures() == theirs | dict.fromkeys(("exact_match", "token_f1"), "normalise:squad")

    chosen = own_task("task.metrics=[choice_accuracy,choice_accuracy_norm]", "task.choices=both")
    endings = [ending.strip() for ending in GOOD["hellaswag"]["endings"]]
    row = {"text": "x", "topic": endings[0], "both": endings}
    ours, theirs = chosen.example(DataRow("", row), ""), one_example("hellaswag", GOOD["hellaswag"])
    for output in ([-9.0, -1.0, -5.0, -5.0], [-4.0, -3.9, -20.0, -8.0]):
        assert [*chosen.score(output, ours).values()] == [*built_in("hellaswag").score(output, theirs).values()]


@pytest.mark.usefixtures("tickets")
def test_a_subclass_has_files_and_templates_and_scores_of_its_own():
    class Shorter(OwnRows):
        metrics = ("shorter",)

        def score(self, output, example):
            return {"shorter": float(len(output) < len(example.references[0]))}

    task = Shorter(compose.compose_config([*WORDS, "task.files=tickets.csv", "task.metrics=[]"]).task)
    task.check_options()
    example = load_examples(task, "test", None)[0]
    assert (example.prompt[:5], task.score("x", example)) == ('Say "', {"shorter": 1.0})


@pytest.mark.parametrize(
    ("form", "same", "other"),
    [
        ("strip", (" Yes ", "Yes"), ("yes", "Yes")),
        ("lower", ("YES  it", "yes it"), ("yes.", "yes")),
        ("squad", ("The yes.", "yes"), ("yes it", "yes")),
        ("number", ("so 1,200 is it: $5.00.", "5.00"), ("none", "5")),
        ("number", ("so it is 42...", "42"), ("5 ...", "...6")),
        ("number", ("10-12", "12"), ("10 -12", "12")),
    ],
)
def test_answers_are_compared_in_a_form_by_name(form, same, other):
    task = own_task(f"task.normalise={form}")
    scores = [task.score(output, Example("", "", "", (answer,)))["exact_match"] for output, answer in (same, other)]
    assert scores == [1.0, 0.0]


def test_an_answer_in_composed_letters_equals_a_reference_in_parts():
    metrics = ("exact_match", "token_f1", "rouge1", "bleu", "chrf")
    task = own_task(f"task.metrics=[{','.join(metrics)}]")
    texts = [unicodedata.normalize(form, "Das größte Café überhaupt ist hier") for form in ("NFC", "NFD")]
    assert texts[0] != texts[1]
    same = task.score(texts[0], Example("", "", "", (texts[0],)))
    assert same["exact_match"] == 1.0
    for output in texts:
        for reference in texts:
            assert task.score(output, Example("", "", "", ("other", reference)))["exact_match"] == 1.0
            assert task.score(output, Example("", "", "", (reference,))) == same


def test_chat_messages_are_asked_with_the_chat_template():
    words = ("task.prompt=''", "task.target=''", "task.messages=m")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?", "name": "Ann"},
        {"role": "assistant", "content": "2"},
    ]
    task = own_task(*words)
    example = task.example(DataRow("here", {"m": turns}), "0")
    assert (example.target, example.references) == ("2", ("2",))
    tokenizer = tiny("tiny_llama").tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    encoder = Encoder(tokenizer, replace(task.config, max_new_tokens=8), context=512)
    asked = tokenizer.decode(encoder.prompt(example.prompt))
    assert asked == "<system>Be brief.<user>One?<assistant>1<user>Two?<a>"


def test_a_file_that_changes_under_a_sweep_is_refused(tickets):
    config = compose.compose_config([*WORDS, "task.files=tickets.csv"])
    write_table(tickets, ROWS[:-1])
    with refused(f"{tickets}: is another file than that of the run's id"):
        load_examples(load_task(config.task), "train", None)
