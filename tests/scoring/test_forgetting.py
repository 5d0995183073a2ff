"""Forgetting: neutral text is split into passages, scored without a prompt, and recorded beside the splits."""

import codecs
import itertools

import pytest
import torch
from helpers.hostile import change_rows, snapshot
from helpers.tiny import folder_of, randomise, tiny_scorer

from tiedlora import storage
from tiedlora.config.identity import run_id
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import LOSS_METRICS, TARGET_LOSS, TARGET_LOSS_BY_TOKEN
from tiedlora.records.scores import read_run_scores
from tiedlora.records.summary import terminal_lines
from tiedlora.runs import add_scores, run, verify
from tiedlora.scoring.passages import PASSAGE_TOKENS, PASSAGES, as_passages, read_passages, split_text
from tiedlora.scoring.split import Scorer

WORDS = " ".join(f"word{i}" for i in range(400))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "neutral.txt"
    path.write_text(f"A title\n\n{WORDS}\n\nThe end.\n")
    return path


@pytest.fixture
def encoder():
    return tiny_scorer("task=gsm8k", "task.max_new_tokens=4", context=64).encoder


@pytest.mark.parametrize("most", [1, 40])
def test_a_split_text_has_every_word_once_in_pieces_that_fit(most):
    pieces = list(split_text(WORDS, lambda piece: len(piece) <= most))
    assert max(map(len, pieces)) <= most
    assert "".join("".join(pieces).split()) == "".join(WORDS.split())
    if most >= 7:
        # No word is cut where a piece can hold a whole one, and the next word would not fit.
        assert " ".join(pieces) == WORDS
        assert all(len(f"{a} {b.split()[0]}") > most for a, b in itertools.pairwise(pieces))


def test_a_file_becomes_consecutive_passages_of_at_most_the_context(text, encoder):
    found = read_passages(str(text), encoder)
    assert all(2 <= len(encoder.text(passage.target)) <= 64 for passage in found)
    assert (
        " ".join(passage.target for passage in found).split()
        == text.read_text().split()[: sum(len(passage.target.split()) for passage in found)]
    )
    assert len({passage.id for passage in found}) == len(found)
    # Other texts have other ids, so their rows are never paired.
    assert not {passage.id for passage in found} & {passage.id for passage in as_passages(["another text"])}
    # A byte order mark is no part of the text, and a long text is not scored to its end.
    text.write_bytes(codecs.BOM_UTF8 + text.read_bytes())
    assert read_passages(str(text), encoder) == found
    text.write_text(" ".join([WORDS] * 10))
    assert len(read_passages(str(text), encoder)) == PASSAGES
    encoder.context = 100_000
    assert max(len(encoder.text(passage.target)) for passage in read_passages(str(text), encoder)) <= PASSAGE_TOKENS


def test_every_token_but_the_first_is_predicted():
    scorer = tiny_scorer("score.batch_size=2", context=64)
    randomise(scorer.arm.adapter, scale=0.2)
    texts = ["One sentence.", "Another, longer sentence.", "Yes"]
    rows = scorer.rows(as_passages(texts), "test", "losses")
    for row, text in zip(rows, texts, strict=True):
        ids = torch.tensor([scorer.encoder.tokenizer(text, add_special_tokens=False).input_ids])
        with torch.no_grad():
            expected = float(scorer.arm.model(input_ids=ids, labels=ids).loss)
        assert row.scores[TARGET_LOSS] == pytest.approx(expected, rel=1e-5)
        assert row.scores[TARGET_LOSS_BY_TOKEN][1] == ids.shape[1] - 1
        assert (row.prompt, row.references, row.output) == ("", [text], "")


def test_no_text_is_one_line(tmp_path, encoder):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        read_passages(str(tmp_path / "empty.txt"), encoder)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_passages(str(tmp_path / "latin.txt"), encoder)


def test_a_run_records_it_and_a_finished_one_gets_it(tiny_config, text, script, monkeypatch, tmp_path):
    config = tiny_config("score.metrics=[target_loss]", f"score.forgetting={text}")
    assert run_id(config) == run_id(tiny_config())
    record = run.main(config)
    folder = folder_of(config)
    scores = read_run_scores(folder)
    (losses,) = scores.of("forgetting")
    (base,) = scores.of("forgetting", base=True)
    assert list(losses.metrics) == list(base.metrics) == list(losses.gain) == list(LOSS_METRICS)
    assert (losses.kind, losses.source, losses.source_digest) == ("losses", str(text), storage.sha256(text))
    assert losses.gain[TARGET_LOSS].value == pytest.approx(
        losses.metrics[TARGET_LOSS].value - base.metrics[TARGET_LOSS].value
    )
    shown = terminal_lines(record, scores, folder.path)
    assert f"forgetting: {losses.rows} passages of {text}, losses in nats" in shown
    assert not [finding for finding in verify.verify(folder.path, rows=100) if finding.ok is False]
    # The same text is not scored again, and the base model's losses are shared by runs of every task.
    with monkeypatch.context() as patch:
        patch.setattr(add_scores, "add_scores", lambda *_, **__: pytest.fail("scored again"))
        run.main(config)
    asked = []
    compute = Scorer.rows
    monkeypatch.setattr(Scorer, "rows", lambda *a, **k: asked.append(a[2]) or compute(*a, **k))
    other = tiny_config("score.metrics=[target_loss]", "score.splits=[]", f"score.forgetting={text}", "tying=LoRA")
    run.main(other)
    assert asked == ["adapted model's loss on forgetting"]
    # A file that has changed is scored again.
    text.write_text(f"A title\n\n{WORDS}\n\nAnother end.\n")
    run.main(config)
    assert read_run_scores(folder).of("forgetting")[0].digest != losses.digest
    # Another text replaces it; verification needs neither file.
    (tmp_path / "other.txt").write_text("Another text. " * 30)
    before = snapshot(folder.path)
    for again in ([], ["--again"]):
        code, _, err = script("scripts/score.py", folder.path, "--forgetting", tmp_path / "other.txt", *again)
        assert code == 0, err
    text.unlink()
    after = snapshot(folder.path)
    assert {name for name in {**before, **after} if before.get(name) != after.get(name)} == {
        "scores/forgetting.losses.jsonl"
    }
    assert not [finding for finding in verify.verify(folder.path, rows=100) if finding.ok is False]
    path = folder.scores_file("forgetting", "losses")
    change_rows(path, lambda row: row.update(references=[row["references"][0].replace("Another", "The other")]), [0])
    wrong = {finding.check for finding in verify.verify(folder.path, rows=0) if finding.ok is False}
    assert {"data forgetting", "scores forgetting.losses"} <= wrong
