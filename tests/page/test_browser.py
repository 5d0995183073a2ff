"""The answers in the page: every row of every chosen run, packed, and hostile texts that stay texts."""

import base64
import dataclasses
import gzip
import itertools
import json
import shutil

from helpers.hostile import HOSTILE, change_rows
from helpers.report_runs import make_record, prediction_rows, score_run, scored_run, write_run

from tiedlora.analysis.groups import group_runs
from tiedlora.analysis.results import result_rows
from tiedlora.analysis.runs import Scorebook, read_runs
from tiedlora.page import browser
from tiedlora.text import visible_lines

ROWS = 6


def unpacked(text):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def run(root, outputs, **about):
    count = len(outputs)
    return scored_run(root, ([1.0, 0.0] * count)[:count], [0.0] * count, output=outputs, **about)


def sheets(root, **options):
    return browser.sheets(result_rows(group_runs(read_runs([root])[0]), Scorebook()), **options)


def test_a_sheet_holds_every_answer_in_blocks_of_rows_and_equal_ones_once(tmp_path, monkeypatch):
    monkeypatch.setattr(browser, "BLOCK", 4)
    run(tmp_path, ["a", "b", "c", "d", "e", "f"], name="LoRA")
    run(tmp_path, ["a", "x", "c", "y", "#### 3", "f"], name="TABuv")
    (sheet,) = sheets(tmp_path)
    assert [column["name"] for column in sheet.head["runs"]] == ["base", "TABuv r=8 · seed 0", "LoRA r=8 · seed 0"]
    index = unpacked(sheet.index)
    blocks = [unpacked(block)["answers"] for block in sheet.texts]
    assert list(map(len, blocks)) == [4, 2]
    answers = list(itertools.chain(*blocks))
    given = [[answers[row][which[row]] for row in range(ROWS)] for which in index["which"]]
    assert given == [["#### 3"] * 6, ["a", "x", "c", "y", "#### 3", "f"], ["a", "b", "c", "d", "e", "f"]]
    assert list(map(len, answers)) == [2, 3, 2, 3, 2, 2]
    assert index["scores"] == [[[0.0] * 6, [1.0, 0.0] * 3, [1.0, 0.0] * 3]]
    assert sheet.head["answers"]
    assert [unpacked(sheet.texts[1])[name][1] for name in ("prompts", "references")] == ["Question 5", ["3"]]


def test_the_base_is_shown_with_its_answers_if_any_run_has_them(tmp_path):
    scored_run(tmp_path, [0.5] * ROWS, [1.0] * ROWS, metric="target_loss", name="TABuv", seed=0)
    run(tmp_path, ["a"] * ROWS, name="TABuv", seed=1)
    (sheet,) = sheets(tmp_path)
    base = next(number for number, column in enumerate(sheet.head["runs"]) if column["name"] == "base")
    (block,) = [unpacked(block)["answers"] for block in sheet.texts]
    which = unpacked(sheet.index)["which"][base]
    assert [block[row][which[row]] for row in range(ROWS)] == ["#### 3"] * ROWS


def test_the_arms_of_the_first_pair_are_first_and_never_two_seeds_of_one(tmp_path):
    for name, seeds in (("LoRA", (0, 1, 2)), ("TABuv", (1, 2)), ("TAB", (2,))):
        for seed in seeds:
            run(tmp_path, ["a"] * ROWS, name=name, seed=seed)
    groups = {group.label: group for group in group_runs(read_runs([tmp_path])[0])}

    def first(*pairs):
        (sheet,) = sheets(tmp_path, pairs=[tuple(groups[name] for name in pair) for pair in pairs])
        return [sheet.head["runs"][column]["name"] for column in sheet.head["pair"]]

    assert first(("LoRA", "TABuv"), ("LoRA", "TAB")) == ["LoRA r=8 · seed 1", "TABuv r=8 · seed 1"]
    assert first(("LoRA", "LoRA"), ("LoRA", "TAB")) == ["LoRA r=8 · seed 2", "TAB r=8 · seed 2"]
    for name in ("TABuv", "TAB"):
        for folder in tmp_path.glob(f"{name}-*"):
            shutil.rmtree(folder)
    assert first(("LoRA", "LoRA")) == ["base", "LoRA r=8 · seed 0"]


def test_hostile_and_long_texts_are_shortened_data_and_differ_beyond_the_shown_part(tmp_path):
    long = "x" * 2**20
    lora = run(tmp_path, [HOSTILE, long + "1", "", "", "", "e"], name="LoRA")
    change_rows(lora / "scores" / "validation.answers.jsonl", lambda row: row.update(output="\ud800"), [3])
    run(tmp_path, [HOSTILE, long + "2", "", "", "", "e"], name="TABuv")
    (base,) = (tmp_path / "base").iterdir()
    change_rows(base, lambda row: row.update(references=[HOSTILE, long], output=long))
    (sheet,) = sheets(tmp_path)
    (block,) = map(unpacked, sheet.texts)
    assert block["answers"][0][1] == visible_lines(HOSTILE)
    assert [answer.startswith("x" * browser.LONGEST + " … (") for answer in block["answers"][1]] == [True] * 3
    assert "<U+D800>" in block["answers"][3]
    assert block["references"][0][0] == visible_lines(HOSTILE)
    assert sum(map(len, sheet.texts)) < 20_000


def test_a_run_whose_rows_cannot_be_shown_is_named(tmp_path):
    run(tmp_path, ["a"] * ROWS, name="LoRA")
    folder = run(tmp_path, ["a"] * ROWS, name="TABuv")
    other = run(tmp_path, ["a"] * ROWS, name="TAB")
    file = folder / "scores" / "validation.answers.jsonl"
    file.write_text(f"{file.read_text().splitlines()[0]}\nno json\n")
    change_rows(other / "scores" / "validation.answers.jsonl", lambda row: row.update(id="another"), [0])
    (sheet,) = sheets(tmp_path)
    assert [column["name"] for column in sheet.head["runs"]] == ["base", "LoRA r=8 · seed 0"]
    assert len(sheet.head["leftOut"]) == 2
    assert any("TAB r=8" in reason and "other rows" in reason for reason in sheet.head["leftOut"])


def test_a_row_without_an_answer_has_none_and_a_corpus_statistic_is_no_score_of_a_row(tmp_path):
    record = make_record()
    write_run(tmp_path, record)
    rows = [
        dataclasses.replace(row, scores={**row.scores, "target_loss_by_token": [1.0, 2.0]})
        for row in prediction_rows([0.5] * ROWS, "target_loss")
    ]
    score_run(tmp_path, record, "validation", rows)
    (sheet,) = sheets(tmp_path)
    assert unpacked(sheet.index)["which"] == [[-1] * ROWS]
    assert sheet.head["metrics"] == [{"name": "target_loss", "sign": -1}]
    assert not sheet.head["answers"]


def test_too_large_a_sheet_leaves_out_the_highest_seeds_and_says_so(tmp_path):
    for seed in range(4):
        run(tmp_path, [f"{seed}{'abcdefgh'[place]}" * 200 for place in range(ROWS)], seed=seed)
    (whole,) = sheets(tmp_path)
    size = len(whole.index) + sum(map(len, whole.texts))
    (cut,) = sheets(tmp_path, most_bytes=size + 99)
    assert [column["name"] for column in cut.head["runs"]] == ["base", *(f"TABuv r=8 · seed {n}" for n in range(3))]
    assert cut.head["leftOut"] == ["TABuv r=8 · seed 3: the page would be too large"]
    assert cut.head["key"] == whole.head["key"]
    # Each arm keeps a seed, whatever its seeds are called.
    for seed in (7, 8):
        run(tmp_path, ["a"] * ROWS, seed=seed, name="LoRA")
    (cut,) = sheets(tmp_path, most_bytes=1)
    assert [column["name"] for column in cut.head["runs"]] == ["base", "TABuv r=8 · seed 0", "LoRA r=8 · seed 7"]
