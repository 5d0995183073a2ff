"""task=rows: mistakes in files and in words, each in one line."""

import io
import re
from pathlib import Path

import pyarrow.parquet
import pytest
from helpers.hostile import snapshot
from helpers.task_rows import TINY, WORDS
from helpers.tiny import composed

from tiedlora.errors import UserError
from tiedlora.tasks import load_examples, load_task


def parquet(**columns: list) -> str:
    file = io.BytesIO()
    # Other than that of datasets, it writes a group of no rows.
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue().decode("latin-1")


PLAIN = "text,topic\nx,a\ny,b\nz,c\n"
FILE_MISTAKES = {  # name of the file, its content, more words -> what the message says
    "no file": ("a.csv", None, "", "task.files.train=", "a.csv: is missing; give a file that is here"),
    "a folder": ("a.csv", "/", "", "a.csv: is not a regular file"),
    "an empty file": ("a.csv", "", "", "a.csv: holds no rows"),
    "a header alone": ("a.csv", "text,topic\n", "", "a.csv: holds no rows"),
    "an empty JSON file": ("a.jsonl", "\n", "", "a.jsonl: holds no rows"),
    "a missing column": (
        "a.csv",
        "text,topics\nx,a\n",
        "",
        "a.csv:2: ",
        "'topic', which is missing (did you mean topics?)",
    ),
    "a missing field": ("a.jsonl", '{"text": "x", "topic": "a"}\n{"text": "y"}\n', "", "a.jsonl:2: ", "it has text"),
    "a broken line": ("a.csv", 'text,topic\nx,"a\nb"\ny\n', "", "a.csv:4: has 1 values for the 2 columns text, topic"),
    "a long line": ("a.csv", "text,topic\nx,y,z\n", "", "a.csv:2: has 3 values for the 2 columns"),
    "an open quote": ("a.csv", 'text,topic\nx,a\ny,"b\n', "", "a.csv:3: is no row of a table (unexpected end of data)"),
    "two columns of one name": ("a.csv", "text,text\n", "", "a.csv:1: two columns have the name 'text'; rename one"),
    "a table of another encoding": (
        "a.csv",
        "text,topic\nx,\xff\n",
        "",
        "a.csv:2: is not UTF-8; save the file as UTF-8",
    ),
    "lines of no JSON": ("a.jsonl", PLAIN, "", "a.jsonl:1: is not valid JSON"),
    "a list of objects": ("a.json", "[]", "", "a.json:1: must be a JSON object, not list; write one in each line"),
    "a table of semicolons": (
        "a.csv",
        PLAIN.replace(",", ";"),
        "",
        "a.csv:1: has a semicolon between its columns, and a .csv has a comma; save it with a comma",
    ),
    "a table of tabs": (
        "a.csv",
        PLAIN.replace(",", "\t"),
        "",
        "a.csv:1: has a tab between its columns, and a .csv has a comma; name the file .tsv, or save it",
    ),
    "a list over several lines": (
        "a.json",
        '[\n{"text": "x", "topic": "a"}\n]',
        "",
        "a.json:1: is JSON over several lines; write each row as an object in one line",
    ),
    "a value that pandas misses": (
        "a.jsonl",
        '{"text": "x", "topic": NaN}\n',
        "",
        "a.jsonl:1: the field 'topic' is NaN, and a template takes a text or a number",
    ),
    "an empty parquet": ("a.parquet", parquet(text=[], topic=[]), "", "a.parquet: holds no rows"),
    "no parquet": ("a.parquet", PLAIN, "", "a.parquet: cannot be read as Parquet ("),
    "a quote of a text that takes in the next rows": (
        "a.tsv",
        'text\ttopic\nx\ta\n"Stop!\tb\ny\tc\nhe said no"\td\n',
        "",
        "a.tsv:3: a quote opens here, and its value goes on over a tab and the end of a line ('Stop!\\tb\\ny",
    ),
    "another kind of file": ("a.xlsx", PLAIN, "", "must end in one of .jsonl, .json, .csv, .tsv, .parquet"),
    "a null": ("a.jsonl", '{"text": null, "topic": "a"}\n', "", "a.jsonl:1: the field 'text' is null, and a template"),
    "a list": ("a.jsonl", '{"text": ["x"], "topic": "a"}\n', "", "a.jsonl:1: the field 'text' is list, and a template"),
    "an empty target": ("a.csv", "text,topic\nx,\n", "", "a.csv:2: the target is empty"),
    "an empty prompt": ("a.csv", "text,topic\n ,a\n", "", "a.csv:2: the prompt is empty: text hold no text"),
    "a target of two lines": ("a.csv", 'text,topic\nx,"a\nb"\n', "", "a.csv:2: the target holds '\\n', at which an"),
    "a target of no number": ("a.csv", PLAIN, "task.normalise=number", "a.csv:2: nothing is left of the target 'a' by"),
    "a target of which ROUGE sees nothing": (
        "a.jsonl",
        '{"text": "x", "topic": "\\u5929\\u6c14"}\n',
        "task.metrics=[chrf,rougeL]",
        "a.jsonl:1: ROUGE sees nothing of the target '天气' but digits, because rouge-score reads only a to z",
    ),
    "a target of which ROUGE sees a year": (
        "a.jsonl",
        '{"text": "x", "topic": "2006 \\u0433\\u043e\\u0434"}\n',
        "task.metrics=[rouge1]",
        "a.jsonl:1: ROUGE sees nothing of the target '2006 год' but digits",
    ),
    "numbers that are choices and numbers of choices": (
        "a.csv",
        "text,topic\nx,1\ny,0\n",
        "CHOICE task.choices=[1,2,3]",
        "a.csv:3: the field 'topic' is 0, which is no choice of 1, 2, 3; choices that are such numbers themselves",
    ),
    "numbers of columns": (
        "a.csv",
        "text,topic,a,b\nx,1,2,1\ny,0,1,0\n",
        "CHOICE task.choices=['{a}','{b}']",
        "a.csv:3: the field 'topic' is 0, which is the text of choice 1 and the number of choice 0 (from 0)",
    ),
    "a target without blanks": (
        "a.jsonl",
        '{"text": "x", "topic": "\\u4eca\\u5929\\u7684\\u5929\\u6c14\\u771f\\u662f\\u5f88\\u597d\\u7684"}\n',
        "task.metrics=[chrf,bleu,token_f1]",
        "a.jsonl:1: the target '今天的天气真是很好的' has no blanks between its words, so token_f1 and bleu "
        "would be 0 for every other answer; choose task.metrics=[chrf]",
    ),
    "too few rows": ("a.csv", "text,topic\nx,a\ny,b\n", "", "of 2 different rows, none is left for train"),
    "all for validation": ("a.csv", PLAIN, "task.validation_from_train=3", "must be less than the 3 train rows"),
    "no such cluster": ("a.csv", PLAIN, "task.cluster=page", "a.csv:", "the field 'page' of task.cluster is missing"),
    "a choice that is none": (
        "a.csv",
        PLAIN,
        "CHOICE task.choices=[a,b]",
        "a.csv:4: ",
        "is 'c', which is no choice of a, b",
    ),
    "choices without quotes in YAML": (
        "a.csv",
        PLAIN,
        "CHOICE task.choices=[true,false]",
        "a.csv:2: ",
        "is 'a', which is no choice of True, False, ",
        "; a YAML file reads yes and no as True and False, so write them in quotes",
    ),
    "one choice": (
        "a.csv",
        PLAIN,
        "CHOICE task.choices=[a]",
        "a.csv:2: the choices must be two or more different texts",
    ),
    "choices of no list": (
        "a.csv",
        PLAIN,
        "CHOICE task.choices=text",
        "a.csv:2: the field 'text' of task.choices must",
    ),
    "messages of no list": (
        "a.csv",
        PLAIN,
        "CHAT task.messages=text",
        "a.csv:2: the field 'text' must be a list of mess",
    ),
    "no messages": (
        "a.csv",
        PLAIN,
        "CHAT task.messages=texts",
        "'texts' of task.messages is missing (did you mean text?)",
    ),
    "messages of another form": (
        "a.jsonl",
        '{"m": [{"from": "human", "value": "x"}]}\n',
        "CHAT task.messages=m",
        "a.jsonl:1: the field 'm' must be a list of messages, each with the texts 'role' and 'content', and is [",
    ),
    "messages with a call of a tool": (
        "a.jsonl",
        '{"m": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}\n',
        "CHAT task.messages=m",
        "a.jsonl:1: the field 'm' has tool_calls, which are not trained; leave such rows out",
    ),
    "messages without an answer": (
        "a.jsonl",
        '{"m": [{"role": "assistant", "content": "y"}, {"role": "user", "content": "x"}]}\n',
        "CHAT task.messages=m",
        "a.jsonl:1: the field 'm' must end with a message of the assistant, after one that it answers",
    ),
}
MISTAKES = {  # more words -> what the message says; the rows are right
    "no rows": ("task.files=null task.files={train: null}", "task.files: names no file; give task.files=FILE"),
    "no prompt": ("task.prompt=''", "task.prompt: is empty; write a template over the columns of your rows"),
    "no target": ("task.target=''", "task.target: is empty; write a template over the columns of your rows"),
    "a target for all": (
        "task.target='topic'",
        "task.target='topic': names no field of a row, so every answer would be",
    ),
    "one metric": (
        "task.metrics=bleu",
        "task.metrics=bleu: must be a list, as in [A,B]. The metrics of task=rows",
    ),
    "no metric": ("task.metrics=[]", "task.metrics: names no metric; choose from exact_match, token_f1, rouge1"),
    "a metric that is none": (
        "task.metrics=[exactmatch]",
        "no such metric; choose from",
        "(did you mean exact_match?)",
    ),
    "a metric twice": ("task.metrics=[bleu,bleu]", "task.metrics", "names bleu twice"),
    "choices of no metric": ("task.choices=[a,b]", "task.metrics=exact_match: is of generated answers"),
    "a metric of no choices": ("task.metrics=[choice_accuracy]", "task.metrics=choice_accuracy: needs task.choices"),
    "a target of no choice": (
        "task.choices=[a,b] task.target='a' task.metrics=[choice_accuracy]",
        "must name one field",
    ),
    "a form that is none": ("task.normalise=lowr", "task.normalise=lowr: must be", "(did you mean lower?)"),
    "a form of nothing": ("task.normalise=lower task.metrics=[bleu]", "task.normalise=lower: changes only exact_match"),
    "a blank at the end": ("task.prompt='{text}: '", "task.prompt: ends with a blank, which belongs to the beginning"),
    "a brace that stays open": ("task.prompt='{text'", "cannot be read (expected '}' before end of string)"),
    "a brace that is text": ("task.target='} {topic}'", "a brace that is text is doubled: {{ or }}"),
    "a format": ("task.prompt='{text!r:>10}'", "may hold only names of fields in braces, such as {text}"),
    "a field of no name": ("task.prompt='{}'", "may hold only names of fields in braces, such as {question}"),
    "an attribute": ("task.prompt='{text.upper}'", "a.csv:2: the template needs the field 'text.upper', which is miss"),
    "a prompt that tells": ("task.prompt='{text} {topic}'", "the model would be told its answer"),
    "messages and templates": ("task.messages=text", "task.messages: its last message is the target"),
    "a test file beside the only file": (
        "task.files.test=b.csv",
        "task.files.test: task.files=FILE is the only file, from which validation and test are cut; with others, each "
        "is named: task.files.train=FILE task.files.test=FILE",
    ),
    "the only file after a test file": (
        "task.files={test: b.csv} task.files.test=b.csv task.files=a.csv",
        "task.files.test: task.files=FILE is the only file",
    ),
    "a list of files": ("task.files=[a.csv,b.csv]", ": must be a mapping, as in {NAME: VALUE, NAME: VALUE}. Files of"),
    "a list in the place of files": (
        "task.files={train: a.csv} task.files=[a.csv,b.csv]",
        ": must be a mapping, as in {NAME: VALUE, NAME: VALUE}. Files of",
    ),
    "files without names": ("task.files={a.csv, b.csv}", "; a mapping is 'KEY={NAME: VALUE, NAME: VALUE}'"),
    "files and the hub": ("task.hub.id=org/name", "task.hub.id=org/name: task.files names the rows; leave one of them"),
    "a file for an option": (
        "task=a.csv",
        "task=a.csv: no such option; rows of your own are task=rows task.files=a.csv",
    ),
    "a split that is none": ("task.files={tests: a.csv}", "task.files.tests", "did you mean task.files.test?"),
    "a split that is missing": (
        "task.files={train: a.csv, validation: b.csv} score.splits=[test]",
        "there are no test rows, only train and",
    ),
    "no training rows": ("task.files={train: null, test: b.csv}", "task.files.train: names no file, and test do; give"),
    "a row in two files": (
        "task.files={train: a.csv, validation: a.csv}",
        "a.csv:2: has the prompt of ",
        "so it is in validation and in tr",
    ),
    "a test row in two files": (
        "task.files={train: a.csv, validation: b.csv, test: b.csv}",
        "b.csv:2: has the prompt of",
    ),
    "a prompt without quotes": (
        "task.prompt={text}",
        "cannot be parsed",
        "a template has quotes of its own inside the",
    ),
    "rows of another task": ("task=gsm8k task.files=a.csv", "task.files: is a key of task=rows; task.kind=gsm8k does"),
}
PLACEHOLDERS = {"CHAT": "task.prompt='' task.target=''", "CHOICE": "task.metrics=[choice_accuracy]"}


def refuse(script, folder: Path, words: list[str], says: tuple[str, ...]) -> None:
    before = snapshot(folder)
    code, out, err = script("train.py", "tracking=none", *TINY, "outputs=outputs", "cache=cache", *words)
    assert all(part in err for part in says), err
    assert (code, out, len(err.splitlines()), err[:7]) == (2, "", 1, "error: ")
    assert snapshot(folder) == before


@pytest.mark.parametrize("what", FILE_MISTAKES)
def test_a_wrong_file_is_one_line_that_names_the_place_and_leaves_nothing(what, tmp_path, monkeypatch, script):
    name, content, more, *says = FILE_MISTAKES[what]
    monkeypatch.chdir(tmp_path)
    if content == "/":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    more = " ".join(PLACEHOLDERS.get(word, word) for word in more.split())
    # Each word keeps its own quotes, which are Hydra's.
    refuse(script, tmp_path, [*WORDS, f"task.files={name}", *more.split()], tuple(says))


@pytest.mark.parametrize("what", MISTAKES)
def test_a_wrong_word_is_one_line_and_leaves_nothing(what, tmp_path, monkeypatch, script):
    more, *says = MISTAKES[what]
    monkeypatch.chdir(tmp_path)
    for file, rows in (("a.csv", PLAIN), ("b.csv", "text,topic\nu,a\nv,b\n")):
        (tmp_path / file).write_text(rows)
    refuse(script, tmp_path, [*WORDS, "task.files=a.csv", *re.split(r" (?=task\.|score\.)", more)], tuple(says))


@pytest.mark.parametrize(("subset", "says"), [(None, "has several configurations"), ("d", "has no configuration 'd'")])
def test_a_data_set_of_several_configurations_is_one_line_with_their_names(subset, says, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    names = ["de", "en", *(f"language_{number:03}" for number in range(99))]
    parts = "".join(f"- config_name: {name}\n  data_files: a.jsonl\n" for name in names)
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    (folder / "a.jsonl").write_text('{"text": "x", "topic": "a"}\n')
    words = [*WORDS, "task.hub.id=org/name", *([f"task.hub.subset={subset}"] if subset else [])]
    for more in ([], ["task.hub.splits={train: train}"]):
        task = load_task(composed([*words, *more]).task)
        with pytest.raises(UserError) as refused:
            load_examples(task, "train", None)
        message = str(refused.value)
        assert message.startswith(f"task.hub.id=org/name: {says}; set task.hub.subset=NAME")
        assert "; it has de, en, language_000, " in message
        assert message.endswith(" ...")
        assert len(message) < 400
