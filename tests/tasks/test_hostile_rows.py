"""Malformed data rows: a table of rows with their messages, and a search for more."""

import json
import zipfile

import pytest
from helpers.hostile import ODD_VALUES, refused, right_or_refused, search
from helpers.task_rows import FIVE, GOOD, task_option, write
from helpers.tiny import folder_of, rows_of
from helpers.tiny import task_option as compose_task
from hypothesis import given
from hypothesis import strategies as st

from tiedlora.config.compose import compose_config
from tiedlora.runs import run
from tiedlora.tasks import digest, load_examples


def line(**changes) -> bytes:
    return json.dumps({**GOOD["gsm8k"], **changes}).encode() + b"\n"


WHOLE = line()
ROWS = {  # the bytes of gsm8k/test.jsonl, and words of the message: one for each rule
    "not UTF-8": (WHOLE + b'{"question": "\xff\xfe"}\n', "test.jsonl:2: is not UTF-8 (byte 14)"),
    "cut short": (WHOLE + WHOLE[:40], "test.jsonl:2: is not valid JSON"),
    "a hundred thousand brackets": (b"[" * 100_000 + b"\n", "test.jsonl:1: is not valid JSON"),
    "an array": (b"[1, 2]\n", "test.jsonl:1: must be a JSON object, not list"),
    "half of a surrogate pair": (line(question="\ud800"), "half of a surrogate pair"),
    "half of a surrogate pair in an id": (line(id="\udfff"), "half of a surrogate pair"),
    "blank lines and a byte order mark": (b"\xef\xbb\xbf\n \n\t\n", "test.jsonl: holds no rows"),
    "a missing field": (b'{"question": "x"}\n', "the field 'answer' is missing (it has question)"),
    "a wrong type": (line(answer=5), "the field 'answer' must be str, not int"),
    "an answer that is not a number": (line(answer="#### 00:03"), "an answer that ends in '#### number'"),
    "an empty id": (
        WHOLE + line(id=" "),
        "test.jsonl:2: the id is empty; give each row its own, or leave the field out",
    ),
    "an id twice": (line(id=1) + line(id="1"), "the id '1' was used before, at"),
}


@pytest.mark.parametrize("what", ROWS)
def test_a_wrong_row_is_named_by_file_and_line(what, tmp_path):
    data, says = ROWS[what]
    write(tmp_path, "gsm8k", data)
    with refused(says, tmp_path):
        load_examples(task_option("gsm8k"), "test", str(tmp_path))


def test_an_id_of_all_train_rows_is_named_before_rows_are_cut_for_validation(tmp_path):
    write(tmp_path, "gsm8k", b"".join(line(question=f"q{number}", id="same") for number in range(5)), split="train")
    with refused("train.jsonl:2: the id 'same' was used before, at", tmp_path):
        load_examples(task_option("gsm8k"), "validation", str(tmp_path))


def test_rows_whose_ids_are_null_have_their_numbers(tmp_path):
    write(tmp_path, "gsm8k", line(id=None) + line(id=None))
    assert [example.id for example in load_examples(task_option("gsm8k"), "test", str(tmp_path))] == ["0", "1"]


def test_hostile_texts_that_are_rows_train_and_score(tmp_path, tiny_run):
    texts = ["\x00\x1b[2J", "<script>alert(1)</script>", "=1+1", "\u202e\u2028\x85", "{answer}", "a" * 300, "\x7f"]
    rows = [line(question=f"{text} {i}", id=f"{text}{i}") for i in range(4) for text in texts]
    write(tmp_path / "data", "gsm8k", *rows, split="train")
    more = (f"data_root={tmp_path}/data", "task.validation_from_train=8", "train.steps=1", "train.warmup_steps=0")
    for seed in (0, 1):  # the second run reads the base model's predictions of the first
        config = compose_config(tiny_run(*more, f"seed={seed}", task="gsm8k"))
        run.main(config)
        assert len(rows_of(folder_of(config), "validation")) == 8


# Python 3.11 warns of a bound that is no whole number, and 3.12 refuses it.
@pytest.mark.filterwarnings("ignore:randrange:DeprecationWarning")
def test_wrong_options_of_generated_rows_are_refused():
    for override, says in (
        ("task.options.rows=3", "rows and parameters must be mappings"),
        ("task.options.dataset=no_such", "reasoning-gym refuses them"),
        ("task.options.parameters.min_terms=2.5", "reasoning-gym refuses them"),
    ):
        with refused(says):
            load_examples(compose_task("chain_sum", override), "train", None)


def test_a_damaged_zip_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and no more")
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for language in ("de", "en"):
            archive.writestr(f"x/train.tags.de-en.{language}", b"\xff\xfe")
    for name in ("cut.zip", "odd.zip"):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, name=name, **__: str(tmp_path / name))
        with refused(f"{name}: is damaged"):
            task_option("iwslt2017").hub_rows("train")


@given(st.data(), st.sampled_from(FIVE))
@search(150)
def test_any_row_is_an_example_or_refused(tmp_path_factory, data, kind):
    row = json.loads(json.dumps(GOOD[kind]))
    if data.draw(st.booleans()):
        place, key = row, data.draw(st.sampled_from(sorted(row)))
        if isinstance(row[key], dict) and data.draw(st.booleans()):
            place, key = row[key], data.draw(st.sampled_from(sorted(row[key])))
        place[key] = data.draw(ODD_VALUES)
    else:
        row = data.draw(ODD_VALUES)
    folder = tmp_path_factory.getbasetemp() / "any-rows"
    path = write(folder, kind, json.dumps(row).encode())
    before = path.read_bytes()
    with right_or_refused():
        (example,) = load_examples(task_option(kind), "test", str(folder))
        assert digest([example])
        json.dumps([example.id, example.prompt, example.target], ensure_ascii=False).encode()
        output = [0.0] * len(example.choices) if example.choices else "any output 5"
        task_option(kind).score(output, example)
    assert path.read_bytes() == before
