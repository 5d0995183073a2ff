"""The answers in the page: every row of every chosen run, packed, and hostile texts that stay texts."""

import base64
import dataclasses
import gzip
import json

from helpers.hostile import HOSTILE
from helpers.report_runs import add_scores, make_record, prediction_rows, scored_run, write_lines, write_run

from tiedlora.analysis.groups import group_runs
from tiedlora.analysis.runs import read_runs
from tiedlora.page import browser, page, write
from tiedlora.text import visible_lines

ROWS = 6


def unpacked(text):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def run(root, outputs, **about):
    count = len(outputs)
    return scored_run(root, ([1.0, 0.0] * count)[:count], [0.0] * count, output=outputs, **about)


def sheets(root, **options):
    groups = group_runs(read_runs([root])[0])
    return browser.sheets(groups, dict.fromkeys(groups, "validation"), **options)


def test_a_sheet_holds_every_answer_and_equal_ones_once(tmp_path):
    run(tmp_path, ["a", "b", "c", "d", "e", "f"], name="LoRA")
    run(tmp_path, ["a", "x", "c", "y", "#### 3", "f"], name="TABuv")
    (sheet,) = sheets(tmp_path)
    assert [column["name"] for column in sheet.head["runs"]] == ["base", "TABuv r=8 · seed 0", "LoRA r=8 · seed 0"]
    index = unpacked(sheet.index)
    (texts,) = map(unpacked, sheet.texts)
    given = [[texts["answers"][row][which[row]] for row in range(ROWS)] for which in index["which"]]
    assert given == [["#### 3"] * 6, ["a", "x", "c", "y", "#### 3", "f"], ["a", "b", "c", "d", "e", "f"]]
    assert [len(answers) for answers in texts["answers"]] == [2, 3, 2, 3, 2, 2]
    assert index["scores"] == [[[0.0] * 6, [1.0, 0.0] * 3, [1.0, 0.0] * 3]]
    assert sheet.head["pair"] == [2, 1], "LoRA against TABuv"
    assert texts["prompts"][1] == "Question 1"
    assert texts["references"][1] == ["3"]


def test_the_pair_has_one_rank_and_one_seed(tmp_path):
    for name, rank, seed in (("LoRA", 1, 0), ("LoRA", 8, 1), ("LoRA", 8, 0), ("TABuv", 8, 1), ("TABuv", 8, 2)):
        run(tmp_path, ["a"] * ROWS, name=name, rank=rank, seed=seed)
    (sheet,) = sheets(tmp_path)
    names = [sheet.head["runs"][column]["name"] for column in sheet.head["pair"]]
    assert names == ["LoRA r=8 · seed 1", "TABuv r=8 · seed 1"]


def test_rows_come_in_blocks(tmp_path):
    count = browser.BLOCK + 50
    run(tmp_path, [f"answer {number}" for number in range(count)])
    (sheet,) = sheets(tmp_path)
    first, second = map(unpacked, sheet.texts)
    assert (len(first["answers"]), len(second["answers"])) == (browser.BLOCK, 50)
    assert second["answers"][0][1] == f"answer {browser.BLOCK}"


def test_hostile_texts_and_a_megabyte_line_are_data(tmp_path):
    long = "x" * 2**20
    texts = [HOSTILE, long, "</script><script>alert(1)</script>", "\ud800", "", "<!--<script>"]
    folder = scored_run(tmp_path / "runs", [1.0] * ROWS, output=texts)
    rows = [
        dataclasses.replace(row, prompt=HOSTILE, references=[HOSTILE, long])
        for row in prediction_rows([1.0] * ROWS, output=texts)
    ]
    write_lines(folder / "predictions" / "validation.jsonl", rows)
    report = write.build([tmp_path / "runs"])
    write.write(report, tmp_path / "report")
    html = (tmp_path / "report" / "index.html").read_text()
    assert html.count("<script>") == 1
    assert "alert(1)" not in html, "what a model wrote is only in the packed data"
    assert len(html) < 300_000
    (sheet,) = sheets(tmp_path / "runs")
    (block,) = map(unpacked, sheet.texts)
    assert block["answers"][0][0] == visible_lines(HOSTILE)
    assert block["answers"][1][0].startswith("x" * browser.LONGEST + " … (")
    assert block["answers"][3][0] == "<U+D800>"
    assert block["references"][0][1].startswith("xxx")


def test_long_answers_that_differ_beyond_the_shown_part_differ(tmp_path):
    same = "y" * browser.LONGEST
    run(tmp_path, [same + "1"] * ROWS, name="LoRA")
    run(tmp_path, [same + "2"] * ROWS, name="TABuv")
    (sheet,) = sheets(tmp_path)
    _, one, other = unpacked(sheet.index)["which"]
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_a_run_whose_rows_cannot_be_shown_is_named(tmp_path):
    run(tmp_path, ["a"] * ROWS, name="LoRA")
    folder = run(tmp_path, ["a"] * ROWS, name="TABuv")
    other = run(tmp_path, ["a"] * ROWS, name="TAB")
    (folder / "predictions" / "validation.jsonl").write_text("no json\n")
    write_lines(other / "predictions" / "validation.jsonl", prediction_rows([1.0] * 4))
    (sheet,) = sheets(tmp_path)
    assert [column["name"] for column in sheet.head["runs"]] == ["base", "LoRA r=8 · seed 0"]
    assert len(sheet.head["leftOut"]) == 2
    assert any("TAB r=8" in reason and "other rows" in reason for reason in sheet.head["leftOut"])


def test_a_row_without_an_answer_has_none_and_a_corpus_statistic_is_no_score_of_a_row(tmp_path):
    rows = prediction_rows([0.5] * ROWS, "target_loss")
    rows = [dataclasses.replace(row, output="", ended="not generated") for row in rows]
    record = add_scores(make_record(), "validation", rows)
    write_run(tmp_path, record, {"validation": rows})
    (sheet,) = sheets(tmp_path)
    assert unpacked(sheet.index)["which"] == [[-1] * ROWS]
    assert sheet.head["metrics"] == [{"name": "target_loss", "sign": -1}]
    statistics = dataclasses.replace(rows[0], scores={"bleu": [1.0, 2.0]})
    assert browser._score(statistics, "bleu") is None


def test_too_large_a_sheet_leaves_out_the_highest_seeds_and_says_so(tmp_path):
    for seed in range(4):
        run(tmp_path, [f"{seed}{'abcdefgh'[place]}" * 200 for place in range(ROWS)], seed=seed)
    (whole,) = sheets(tmp_path)
    (cut,) = sheets(tmp_path, most_bytes=whole.size - 1)
    assert [column["name"] for column in cut.head["runs"]] == ["base", *(f"TABuv r=8 · seed {n}" for n in range(3))]
    assert cut.head["leftOut"] == ["TABuv r=8 · seed 3: the page would be too large"]
    assert cut.head["key"] == whole.head["key"]


def test_equal_runs_give_equal_bytes(tmp_path):
    scored_run(tmp_path / "runs", [1.0, 0.0] * 25, [0.0] * 50)
    for name in ("one", "two"):
        write.write(write.build([tmp_path / "runs"]), tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert {"index.html", "results.csv", "pareto.png", "pareto.svg"} <= set(one)
    assert one == two


def test_a_head_cannot_end_its_script_element(tmp_path):
    assert "<" not in page._json({"title": "</script><script>alert(1)</script>"})
