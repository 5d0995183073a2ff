"""From rows to prompts and targets: the properties of each task, and the rows that it refuses."""

import re

import pytest
from helpers.task_rows import FIVE, GOOD, RELABELLED, one_example, task_option, write

from tiedlora.errors import UserError
from tiedlora.places import PROJECT
from tiedlora.tasks import Example, Task, digest, load_examples, render
from tiedlora.tasks.hellaswag import cleaned
from tiedlora.tasks.rows import DataRow, NoSuchSplit, RowError

DATA = PROJECT.parent / "shared" / "data"


def test_the_prompt_and_target_of_each_task():
    examples = {kind: one_example(kind, GOOD[kind]) for kind in FIVE}
    squad_prompt = "Passage: Rome was founded in 753 BC by Romulus.\nQuestion: Who founded Rome?\nAnswer:"
    assert examples["squad"].prompt == squad_prompt
    assert (examples["squad"].target, examples["squad"].references) == (" Romulus", ("Romulus", "by Romulus"))
    assert examples["hellaswag"].prompt == "Cooking: A man cuts an onion. He"
    assert examples["hellaswag"].choices == (" cries.", " sings.", " eats it.", " cuts a second onion.")
    assert (examples["hellaswag"].target, examples["hellaswag"].references) == (" cries.", ("0",))
    assert examples["dialogsum"].prompt == "#Person1#: Hi.\n\nSummary:"
    assert examples["iwslt2017"].prompt == "German: Vielen Dank.\nEnglish:"
    assert examples["iwslt2017"].references == (" Thank you.",)
    assert examples["gsm8k"].references == ("5",)


@pytest.mark.parametrize("kind", FIVE)
def test_the_target_is_not_in_the_prompt(kind):
    before, after = (one_example(kind, row) for row in (GOOD[kind], {**GOOD[kind], **RELABELLED[kind]}))
    assert before.target != after.target
    assert (before.prompt, before.choices) == (after.prompt, after.choices)


BAD = {  # (task, error) -> (row, words of the message)
    ("squad", "wrong inner type"): ({**GOOD["squad"], "answers": {"text": "x", "answer_start": [0]}}, "lists 'text'"),
    ("squad", "no answer"): ({**GOOD["squad"], "answers": {"text": [], "answer_start": []}}, "target is empty"),
    ("squad", "empty question"): ({**GOOD["squad"], "question": " "}, "'question' is empty"),
    ("squad", "answer not in context"): (
        {**GOOD["squad"], "answers": {"text": ["Remus"], "answer_start": [0]}},
        "'Remus' is not in the context",
    ),
    ("hellaswag", "label out of range"): ({**GOOD["hellaswag"], "label": "4"}, "out of range"),
    ("hellaswag", "wrong type"): ({**GOOD["hellaswag"], "ind": True}, "'ind' must be int, not bool"),
    ("hellaswag", "three endings"): ({**GOOD["hellaswag"], "endings": ["a", "b", "c"]}, "must hold 4 texts"),
    ("hellaswag", "empty ending"): ({**GOOD["hellaswag"], "endings": ["a", "b", "c", ""]}, "none empty"),
    ("dialogsum", "empty dialogue"): ({**GOOD["dialogsum"], "dialogue": ""}, "'dialogue' is empty"),
    ("iwslt2017", "missing field"): ({"translation": {"de": "Danke."}}, "must hold a text 'en'"),
    ("iwslt2017", "empty source"): ({"translation": {"de": " ", "en": "x"}}, "'translation.de' is empty"),
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
    assert [example.id for example in load_examples(task_option("dialogsum"), "test", str(tmp_path))] == [
        "dev_0",
        "dev_1",
    ]
    path = write(tmp_path, "dialogsum", rows[0], {**rows[1], "dialogue": "another"})
    with pytest.raises(UserError, match=re.escape(f"{path}:2: is grouped with")):
        load_examples(task_option("dialogsum"), "test", str(tmp_path))


def test_a_context_of_hellaswag_that_is_scored_is_not_trained(tmp_path):
    """The official training and validation rows share some, and nobody can remove them from the hub."""
    shared, other = GOOD["hellaswag"], {**GOOD["hellaswag"], "ind": 8, "ctx_a": "A man peels a pear."}
    for split, rows in (("train", [shared, other]), ("validation", [shared]), ("test", [{**shared, "ctx_b": "she"}])):
        write(tmp_path, "hellaswag", *rows, split=split)
    task = task_option("hellaswag", "task.rows.validation=null")
    assert [example.id for example in load_examples(task, "train", str(tmp_path))] == ["activitynet-8"]


def test_hellaswag_marks_are_removed_as_the_harness_does():
    raw = "[header] How to rest [title] Lie down. [step] Close  your eyes. [substeps] Sleep."
    assert cleaned(raw) == " How to rest. Lie down. Close your eyes. Sleep."
    row = {**GOOD["hellaswag"], "source_id": "wikihow~1", "ctx_a": raw, "ctx_b": "", "endings": ["[title] a", *"bcd"]}
    example = one_example("hellaswag", row)
    assert example.prompt == "Cooking: How to rest. Lie down. Close your eyes. Sleep."
    assert example.choices[0] == "  a"
    # A row that was cleaned before keeps its double blanks.
    clean = {**row, "ctx_a": "Lie  down.", "endings": [" a  b", *"bcd"]}
    example = one_example("hellaswag", clean)
    assert (example.prompt, example.choices[0]) == ("Cooking: Lie  down.", "  a  b")


@pytest.mark.skipif(not DATA.is_dir(), reason="real rows are looked for in ../shared/data, never committed")
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
    assert [example.prompt for example in plain] == [example.prompt for example in shuffled]
    assert all(a.target != b.target for a, b in zip(plain, shuffled, strict=True))
    assert sorted(example.target for example in plain) == sorted(example.target for example in shuffled)
    assert digest(plain) != digest(shuffled)
    words, data = "task.rows.validation=5", str(tmp_path)
    write(tmp_path, "iwslt2017", *rows, split="validation")
    scored = load_examples(task_option("iwslt2017", words, "task.shuffle_targets=true"), "validation", data)
    assert scored == load_examples(task_option("iwslt2017", words), "validation", data), "only training rows are"


def test_render_puts_fields_in_and_interprets_nothing_else():
    row = DataRow("here", {"a": "{b} {0} %s", "b": "{a}"})
    assert render("{a}{{}}{b}%s", row) == "{b} {0} %s{}{a}%s"
    with pytest.raises(RowError, match="'c', which is missing"):
        render("{c}", row)


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
    (tmp_path / "iwslt2017" / "test.jsonl").write_text("damaged\n")
    with pytest.raises(UserError, match=r"test\.jsonl:1"):
        trained()

    class OnTheHub(Grouped):
        def hub_rows(self, split):
            if isinstance(hub[split], UserError):
                raise hub[split]
            return [DataRow("hub", {"id": question, "question": question}) for question in hub[split]]

    hub = {"train": "xyz", "validation": "x", "test": NoSuchSplit("the hub has no test split of it")}
    task = OnTheHub(task_option("squad", "task.cluster=null", "task.rows.train=null").config)
    assert [example.prompt for example in load_examples(task, "train", None)] == ["y", "z"]
    hub["validation"] = UserError("x cannot be loaded")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_examples(task, "train", None)


class Grouped(Task):
    """Rows like a_1 and a_2 are references of one prompt, and prompts recur."""

    fields = {"id": str, "question": str}
    inputs_recur = True

    def group_id(self, row_id):
        return row_id.split("_")[0]

    def example(self, row, id):
        return Example(id, row["question"], "answer")


@pytest.mark.parametrize(("seed", "held_out"), list(enumerate(["ab", "ba", "ca", "cd", "ac", "bd"])))
def test_validation_from_train_takes_whole_groups_and_no_prompt_is_in_both(seed, held_out, tmp_path):
    rows = [{"id": f"{group}_{i}", "question": group} for group in "abcd" for i in (1, 2)]
    rows.append({"id": "e_1", "question": "a"})
    write(tmp_path, "grouped", *rows, split="train")
    options = ["task.folder=grouped", "task.cluster=null", "task.validation_from_train=2", f"task.split_seed={seed}"]
    options += ["task.rows.train=null", "task.rows.validation=null"]
    task = Grouped(task_option("squad", *options).config)
    train, validation = (
        [example.prompt for example in load_examples(task, split, str(tmp_path))] for split in ("train", "validation")
    )
    assert "".join(validation) == held_out
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == set("abcd")


def test_an_ending_that_is_only_a_mark_can_be_scored():
    row = {**GOOD["hellaswag"], "endings": ["[substeps]", " sings.", " eats it.", " cuts it."], "label": "1"}
    task, example = task_option("hellaswag"), one_example("hellaswag", row)
    assert task.score([-9.0, -1.0, -5.0, -5.0], example)["accuracy_norm"] == 1.0
