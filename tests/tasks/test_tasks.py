"""Rows become prompts and targets: what each task promises, and what it refuses."""

import functools
import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny import task_option as compose_task
from hypothesis import given, settings
from hypothesis import strategies as st

from tiedlora.config import compose as configuration
from tiedlora.config.project import PROJECT
from tiedlora.errors import UserError
from tiedlora.tasks import SPLITS, Task, digest, load_examples, render
from tiedlora.tasks.hellaswag import cleaned
from tiedlora.tasks.iwslt2017 import evaluation_lines, ted_pair, training_lines, zipped_rows
from tiedlora.tasks.rows import RowError

DATA = PROJECT.parent / "shared" / "data"
needs_rows = pytest.mark.skipif(not DATA.is_dir(), reason="real rows are looked for in ../shared/data, never committed")

# Composing a configuration costs a third of a second, and tasks keep no state.
task_option = functools.cache(compose_task)

FIVE = ("gsm8k", "squad", "hellaswag", "dialogsum", "iwslt2017")
GOOD = {
    "gsm8k": {"question": "How many?", "answer": "2 and 3 are <<2+3=5>>5\n#### 5"},
    "squad": {
        "id": "q1",
        "title": "Rome",
        "context": "Rome was founded in 753 BC by Romulus.",
        "question": "Who founded Rome?",
        "answers": {"text": ["Romulus", "by Romulus"], "answer_start": [30, 27]},
    },
    "hellaswag": {
        "ind": 7,
        "activity_label": "Cooking",
        "ctx_a": "A man cuts an onion.",
        "ctx_b": "he",
        "ctx": "A man cuts an onion. he",
        "endings": ["cries.", "sings.", "eats it.", "cuts a second onion."],
        "source_id": "activitynet~v_1",
        "split": "val",
        "split_type": "indomain",
        "label": "0",
    },
    "dialogsum": {"id": "train_1", "dialogue": "#Person1#: Hi.", "summary": "#Person1# greets.", "topic": "greeting"},
    "iwslt2017": {"translation": {"de": "Vielen Dank.", "en": "Thank you."}},
}
SENTINEL = "\u2603 sentinel 12345"


def relabelled(kind: str, row: dict) -> dict:
    """The row with its target fields replaced, and still a row of that task."""
    row = json.loads(json.dumps(row))
    if kind == "gsm8k":
        row["answer"] = f"{SENTINEL}\n#### 99"
    elif kind == "squad":
        first = row["context"].split()[0]
        row["answers"] = {"text": [first], "answer_start": [row["context"].index(first)]}
    elif kind == "hellaswag":
        row["label"] = str((int(row["label"]) + 1) % 4)
    elif kind == "dialogsum":
        row["summary"] = SENTINEL
    else:
        row["translation"]["en"] = SENTINEL
    return row


def write(root: Path, kind: str, *rows: dict | str | bytes, split: str = "test") -> Path:
    path = root / kind / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def real_rows(kind: str, split: str, count: int) -> list[dict]:
    lines = (DATA / kind / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in random.Random(0).sample(lines, count)]


def one_example(kind: str, row: dict, *overrides: str):
    task = task_option(kind, *overrides)
    return task.example(row, "0")


def test_the_prompt_and_target_of_each_task():
    found = {kind: one_example(kind, GOOD[kind]) for kind in FIVE}
    assert (
        found["squad"].prompt == "Passage: Rome was founded in 753 BC by Romulus.\nQuestion: Who founded Rome?\nAnswer:"
    )
    assert (found["squad"].target, found["squad"].references) == (" Romulus", ("Romulus", "by Romulus"))
    assert found["hellaswag"].prompt == "Cooking: A man cuts an onion. He"
    assert found["hellaswag"].choices == (" cries.", " sings.", " eats it.", " cuts a second onion.")
    assert (found["hellaswag"].target, found["hellaswag"].references) == (" cries.", ("0",))
    assert found["dialogsum"].prompt == "#Person1#: Hi.\n\nSummary:"
    assert found["iwslt2017"].prompt == "German: Vielen Dank.\nEnglish:"
    assert found["iwslt2017"].references == (" Thank you.",)
    assert found["gsm8k"].references == ("5",)


@pytest.mark.parametrize("kind", FIVE)
def test_the_target_is_not_in_the_prompt(kind):
    """Replacing what is to be learned leaves what is asked byte-identical."""
    before, after = (one_example(kind, row) for row in (GOOD[kind], relabelled(kind, GOOD[kind])))
    assert before.target != after.target
    assert (before.prompt, before.choices) == (after.prompt, after.choices)


@needs_rows
@pytest.mark.parametrize("kind", FIVE)
def test_the_target_is_not_in_the_prompt_of_real_rows(kind):
    for row in real_rows(kind, "train", 200):
        before, after = one_example(kind, row), one_example(kind, relabelled(kind, row))
        assert (before.prompt, before.choices) == (after.prompt, after.choices)


BAD = {  # task, what is wrong -> (row, words of the message)
    ("squad", "missing field"): ({k: v for k, v in GOOD["squad"].items() if k != "question"}, "'question' is missing"),
    ("squad", "wrong type"): ({**GOOD["squad"], "answers": ["Romulus"]}, "'answers' must be dict, not list"),
    ("squad", "wrong inner type"): ({**GOOD["squad"], "answers": {"text": "x", "answer_start": [0]}}, "lists 'text'"),
    ("squad", "no answer"): ({**GOOD["squad"], "answers": {"text": [], "answer_start": []}}, "target is empty"),
    ("squad", "empty target"): ({**GOOD["squad"], "answers": {"text": [" "], "answer_start": [4]}}, "target is empty"),
    ("squad", "empty question"): ({**GOOD["squad"], "question": " "}, "'question' is empty"),
    ("squad", "answer not in context"): (
        {**GOOD["squad"], "answers": {"text": ["Remus"], "answer_start": [0]}},
        "'Remus' is not in the context",
    ),
    ("hellaswag", "label out of range"): ({**GOOD["hellaswag"], "label": "4"}, "out of range"),
    ("hellaswag", "no label"): ({**GOOD["hellaswag"], "label": ""}, "out of range"),
    ("hellaswag", "label of a wrong type"): ({**GOOD["hellaswag"], "label": 0}, "'label' must be str, not int"),
    ("hellaswag", "wrong type"): ({**GOOD["hellaswag"], "ind": True}, "'ind' must be int, not bool"),
    ("hellaswag", "three endings"): ({**GOOD["hellaswag"], "endings": ["a", "b", "c"]}, "must hold 4 texts"),
    ("hellaswag", "empty ending"): ({**GOOD["hellaswag"], "endings": ["a", "b", "c", ""]}, "none empty"),
    ("dialogsum", "empty target"): ({**GOOD["dialogsum"], "summary": " \n"}, "target is empty"),
    ("dialogsum", "empty dialogue"): ({**GOOD["dialogsum"], "dialogue": ""}, "'dialogue' is empty"),
    ("dialogsum", "wrong type"): ({**GOOD["dialogsum"], "summary": None}, "must be str, not NoneType"),
    ("iwslt2017", "missing field"): ({"translation": {"de": "Danke."}}, "must hold a text 'en'"),
    ("iwslt2017", "empty target"): ({"translation": {"de": "Danke.", "en": ""}}, "target is empty"),
    ("iwslt2017", "empty source"): ({"translation": {"de": " ", "en": "x"}}, "'translation.de' is empty"),
    ("gsm8k", "no number"): ({**GOOD["gsm8k"], "answer": "five"}, "#### number"),
    ("gsm8k", "empty target"): ({**GOOD["gsm8k"], "answer": ""}, "target is empty"),
    ("gsm8k", "half a character"): ('{"question": "\\ud800?", "answer": "#### 5"}', "surrogate"),
    ("gsm8k", "broken JSON"): ('{"question": "How', "is not valid JSON"),
    ("gsm8k", "not an object"): ("[1, 2]", "must be a JSON object, not list"),
    ("gsm8k", "wrong encoding"): ('{"question": "Wie gro\u00df?"}'.encode("latin-1"), "is not UTF-8"),
}


@pytest.mark.parametrize(("kind", "what"), BAD, ids=" ".join)
def test_a_bad_row_is_named(kind, what, tmp_path):
    row, words = BAD[kind, what]
    good = {**GOOD[kind], **({"id": "other"} if "id" in GOOD[kind] else {"ind": 1} if kind == "hellaswag" else {})}
    path = write(tmp_path, kind, good, row)
    with pytest.raises(UserError) as caught:
        load_examples(task_option(kind), "test", str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["squad", "hellaswag", "dialogsum"])
def test_an_id_that_comes_twice_is_named(kind, tmp_path):
    path = write(tmp_path, kind, GOOD[kind], GOOD[kind])
    with pytest.raises(UserError, match=re.escape(f"{path}:2: the id ") + ".* was used before, at .*:1"):
        load_examples(task_option(kind), "test", str(tmp_path))


def test_references_of_one_dialogue_are_one_example(tmp_path):
    rows = [
        {"id": f"test_{n}_{k}", "dialogue": f"#Person1#: {n}", "summary": f"{n} {k}"} for n in (0, 1) for k in (1, 2, 3)
    ]
    write(tmp_path, "dialogsum", *rows)
    task = task_option("dialogsum", "task.rows.test=1")
    (example,) = load_examples(task, "test", str(tmp_path))
    assert (example.id, example.references) == ("test_0", (" 0 1", " 0 2", " 0 3"))
    assert task.score("0 3", example)["rouge1"] == 1.0
    with pytest.raises(UserError, match=r"task\.rows\.test=3: there are only 2"):
        load_examples(task_option("dialogsum", "task.rows.test=3"), "test", str(tmp_path))
    write(tmp_path, "dialogsum", *({**row, "id": row["id"].replace("test", "dev")[:-2]} for row in rows[::3]))
    assert [e.id for e in load_examples(task_option("dialogsum"), "test", str(tmp_path))] == ["dev_0", "dev_1"]
    path = write(tmp_path, "dialogsum", rows[0], {**rows[1], "dialogue": "another"})
    with pytest.raises(UserError, match=re.escape(f"{path}:2: is grouped with")):
        load_examples(task_option("dialogsum"), "test", str(tmp_path))


def test_hellaswag_marks_are_removed_as_the_harness_does():
    raw = "[header] How to rest [title] Lie down. [step] Close  your eyes. [substeps] Sleep."
    assert cleaned(raw) == " How to rest. Lie down. Close your eyes. Sleep."
    row = {**GOOD["hellaswag"], "source_id": "wikihow~1", "ctx_a": raw, "ctx_b": "", "endings": ["[title] a", *"bcd"]}
    example = one_example("hellaswag", row)
    assert example.prompt == "Cooking: How to rest. Lie down. Close your eyes. Sleep."
    assert example.choices[0] == "  a"


@needs_rows
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_clean_hellaswag_rows_pass_through_unchanged(split):
    for row in real_rows("hellaswag", split, 500):
        example = one_example("hellaswag", row)
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}".rstrip()
        assert example.prompt == f"{row['activity_label']}: {context}"
        assert example.choices == tuple(f" {ending}" for ending in row["endings"])


@needs_rows
@pytest.mark.parametrize("kind", FIVE)
def test_no_validation_prompt_is_trained_on(kind):
    task = task_option(kind, "task.rows.validation=null")
    train, validation = ({e.prompt for e in load_examples(task, s, str(DATA))} for s in ("train", "validation"))
    assert not train & validation


@needs_rows
@pytest.mark.parametrize("kind", FIVE)
def test_every_local_row_is_good(kind):
    for split in ("train", "test") if kind == "gsm8k" else ("train", "validation", "test"):
        nothing_left_out = ("task.rows.validation=null", "task.validation_from_train=0")
        examples = load_examples(task_option(kind, *nothing_left_out), split, str(DATA))
        assert len({example.id for example in examples}) == len(examples)
        if (kind, split) == ("dialogsum", "test"):
            assert (len(examples), {len(example.references) for example in examples}) == (350, {3})


def test_shuffled_targets_keep_prompts_and_references(tmp_path):
    rows = [{"translation": {"de": f"{n}", "en": f"{n}"}} for n in range(5)]
    write(tmp_path, "iwslt2017", *rows, split="train")
    plain = load_examples(task_option("iwslt2017"), "train", str(tmp_path))
    shuffled = load_examples(task_option("iwslt2017", "task.shuffle_targets=true"), "train", str(tmp_path))
    assert [e.prompt for e in plain] == [e.prompt for e in shuffled]
    assert all(a.target != b.target for a, b in zip(plain, shuffled, strict=True))
    assert sorted(e.target for e in plain) == sorted(e.target for e in shuffled)
    assert digest(plain) != digest(shuffled)


@given(
    st.dictionaries(st.sampled_from(["a", "b"]), st.text(), min_size=2), st.text(st.characters(exclude_characters="{}"))
)
@settings(max_examples=50, deadline=None)
def test_render_puts_fields_in_and_interprets_nothing_else(row, between):
    assert render("{a}" + between + "{b}", row) == row["a"] + between + row["b"]


def test_render_names_a_field_that_is_missing():
    with pytest.raises(RowError, match="'c', which is missing"):
        render("{c}", {"a": "x"})


def test_a_missing_source_names_three_ways(tmp_path):
    for kind in FIVE:
        with pytest.raises(UserError, match=r"Three ways .*fetch_data.*data_root=FOLDER") as caught:
            load_examples(task_option(kind), "train", str(tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", FIVE)
def test_fetch_without_the_hub_ends_with_one_line(kind, tmp_path):
    sys.path.insert(0, str(PROJECT / "scripts"))
    try:
        import fetch_data
    finally:
        sys.path.pop(0)
    with pytest.raises(UserError, match=f"task={kind}: .* cannot be loaded .*Three ways") as caught:
        fetch_data.main([f"task={kind}", f"data_root={tmp_path}/data"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()
    with pytest.raises(UserError, match="data_root: has no value"):
        fetch_data.main([f"task={kind}"])


def test_fetch_writes_what_training_reads(tmp_path, monkeypatch):
    sys.path.insert(0, str(PROJECT / "scripts"))
    try:
        import fetch_data
    finally:
        sys.path.pop(0)
    from tiedlora.tasks.rows import Row

    monkeypatch.setattr(Task, "hub_rows", lambda self, split: [Row("hub", GOOD["squad"])])
    fetch_data.main(["task=squad", f"data_root={tmp_path}"])
    (example,) = load_examples(task_option("squad", "task.rows.validation=1"), "validation", str(tmp_path))
    assert example == replace(one_example("squad", GOOD["squad"]), id="q1")


def test_iwslt_pairs_come_out_of_the_official_zip(tmp_path):
    """A zip made here in the official one's form: tags about talks, XML segments, entities, an empty side."""
    train = {
        "de": "<url>x</url>\n<title>T</title>\n Guten Tag. \n\nEins &amp; zwei\n<reviewer></reviewer>\n",
        "en": "<url>x</url>\n<title>T</title>\n Good day. \nLeft over\nOne &amp; two\n<reviewer></reviewer>\n",
    }
    xml = '<mteval><refset><doc docid="1"><seg id="1"> {} </seg>\n<seg id="2">A &amp; B</seg></doc></refset></mteval>'
    path = tmp_path / "de-en.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for language, hello in (("de", "Hallo"), ("en", "Hello")):
            archive.writestr(f"de-en/train.tags.de-en.{language}", train[language])
            archive.writestr(f"de-en/IWSLT17.TED.tst2010.de-en.{language}.xml", xml.format(hello))
        archive.writestr("de-en/IWSLT17.TED.tst2011.de-en.de.xml", xml.format("Hallo"))
        archive.writestr("de-en/IWSLT17.TED.tst2011.de-en.en.xml", "<seg>one</seg>")
    with zipfile.ZipFile(path) as archive:
        pairs = [row.fields["translation"] for row in zipped_rows(archive, "train")]
        assert pairs == [{"de": "Guten Tag.", "en": "Good day."}, {"de": "Eins &amp; zwei", "en": "One &amp; two"}]
        pairs = [row.fields["translation"] for row in zipped_rows(archive, "tst2010")]
        assert pairs == [{"de": "Hallo", "en": "Hello"}, {"de": "A & B", "en": "A & B"}]
        with pytest.raises(UserError, match="tst2011 has 2 German and 1 English"):
            zipped_rows(archive, "tst2011")
        with pytest.raises(UserError, match=r"holds no IWSLT17\.TED\.tst2019"):
            zipped_rows(archive, "tst2019")
    assert training_lines("a\n\nb\n") == ["a", "", "b"]
    assert evaluation_lines('<seg id="1">a\nb</seg>') == ["a\nb"]
    assert ted_pair({"english": "e", "non_english": "d"}) == {"translation": {"de": "d", "en": "e"}}


def test_sets_of_the_zip_make_up_the_hubs_splits(tmp_path, monkeypatch):
    path = tmp_path / "de-en.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for language in ("de", "en"):
            archive.writestr(f"train.tags.de-en.{language}", f"Neu {language}\n")
            for name in ("dev2010", "tst2010", "tst2011"):
                archive.writestr(f"IWSLT17.TED.{name}.de-en.{language}.xml", f'<seg id="1">{name} {language}</seg>')
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *arguments, **keywords: str(path))
    task = compose_task("iwslt2017", "task.hub.splits.test=tst2010+tst2011")
    found = {split: [row.fields["translation"]["de"] for row in task.hub_rows(split)] for split in SPLITS}
    assert found == {"train": ["Neu de"], "validation": ["dev2010 de"], "test": ["tst2010 de", "tst2011 de"]}


def test_sentences_that_are_scored_are_not_trained_on(tmp_path):
    def pairs(*sentences):
        return [{"translation": {"de": sentence, "en": f"in English: {sentence}"}} for sentence in sentences]

    write(tmp_path, "iwslt2017", *pairs("Vielen  Dank.", "Neu.", "Eins.", "Alt."), split="train")
    write(tmp_path, "iwslt2017", *pairs("Vielen Dank."), split="validation")

    def trained(*overrides):
        task = task_option("iwslt2017", *overrides)
        return [example.references[0] for example in load_examples(task, "train", str(tmp_path))]

    assert trained() == [f" in English: {sentence}" for sentence in ("Neu.", "Eins.", "Alt.")]
    write(tmp_path, "iwslt2017", *pairs("Eins."), split="test")
    assert trained() == [f" in English: {sentence}" for sentence in ("Neu.", "Alt.")]
    assert trained("task.rows.train=1") == [" in English: Neu."]
    with pytest.raises(UserError, match=r"task\.rows\.train=3: there are only 2"):
        trained("task.rows.train=3")


@pytest.mark.parametrize("option", configuration.options("task"))
def test_every_task_option_names_a_task_and_its_metrics(option):
    task = task_option(option)
    assert task.metrics
    assert set(task.corpus_metrics) <= set(task.metrics)
    assert (PROJECT / "conf" / "task" / f"{option}.yaml").read_text().startswith(f"# python train.py task={option}")


def test_options_that_a_task_does_not_know_are_refused():
    with pytest.raises(UserError, match=r"task\.options"):
        compose_task("dialogsum", "+task.options.stemmer=true").signatures()
    with pytest.raises(UserError, match=r"task\.target"):
        task_option("hellaswag", "task.target=x")


def code_blocks(page: str) -> dict[str, str]:
    """The page's code blocks whose first line names a file, by that name."""
    blocks = re.findall(r"```\w+\n(.*?)```", (PROJECT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    named = (re.match(r"(?:#|//) (\S+\.(?:py|yaml|jsonl))\n", block) for block in blocks)
    return {match[1]: block[match.end() :] for match, block in zip(named, blocks, strict=True) if match}


def test_a_sixth_task_is_one_file_and_one_yaml(tmp_path):
    """docs/adding-a-task.md, carried out to the letter in a copy of the project."""
    for name in ("src", "conf", "train.py", "pyproject.toml"):
        source = PROJECT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    blocks = code_blocks("adding-a-task.md")
    assert {name.partition("/")[0] for name in blocks} == {"src", "conf", "rows"}
    for name, text in blocks.items():
        path = tmp_path / name
        assert not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    command = [sys.executable, "train.py", "task=antonyms", "data_root=rows", "model=tiny_llama", "train=tiny"]
    done = subprocess.run(
        [*command, "train.steps=2", "train.warmup_steps=0", "train.threads=1", "outputs=outputs", "cache=cache"],
        cwd=tmp_path,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(tmp_path / "src"),
            "OMP_NUM_THREADS": "1",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (result,) = (tmp_path / "outputs").glob("*/result.json")
    scores = json.loads(result.read_text())["scores"]["validation"]
    assert set(scores["metrics"]) == {"exact_match"}
    assert scores["metrics"]["exact_match"]["method"] == "wilson"
