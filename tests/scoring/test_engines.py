"""score.engine: each engine writes our answers, the record says how many were compared, and none changes old runs."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import task_rows
from helpers.tiny import TINY, randomise, tiny

from tiedlora.adapter import attach
from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.errors import UserError
from tiedlora.records.rows import read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import EngineRecord
from tiedlora.records.summary import terminal_lines
from tiedlora.runs import run, verify
from tiedlora.scoring import continuous, vllm_engine
from tiedlora.scoring.answer_ends import Output
from tiedlora.scoring.decoding import generate
from tiedlora.scoring.engines import agreement, compared_places

TEXTS = ["a", "some longer text", "xyz", "12 + 30 =", "b" * 30, "the end", "?", "one more", "and 1"]


ROW = {
    **{"activity_label": "Sitting", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["eats.", "is", "x", "y"]},
    **{"source_id": "activitynet~v", "label": "0"},
}


def folder_of(config) -> RunFolder:
    return RunFolder(Path(config.outputs) / run_id(config))


def settings_with_stops(base, prompts, new=50):
    free = generate(base.model, base.tokenizer, prompts, max_new_tokens=new, batch_size=9)
    letters = {letter for output in free for letter in output.text if letter.isascii() and letter.isprintable()}
    stop = sorted(letters, key=lambda letter: (sum(letter in output.text for output in free), letter))[:4]
    # Some of them as tokens that end an answer.
    ends = [base.tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in stop[2:]]
    return {"max_new_tokens": new, "stop": stop[:2], "more_ends": ends}


@pytest.mark.parametrize("limits", [{"batch_size": 2}, {"batch_size": 9, "batch_tokens": 128}, {"batch_size": 64}])
@pytest.mark.parametrize("name", TINY)
def test_continuous_batching_writes_our_answers(name, limits):
    """In float32, where rounding changes no answer of this model; with an adapter, and with rows of several pages."""
    base = tiny(name)
    randomise(attach(base.model, "TABuv", 4).adapter, scale=0.2)
    prompts = [base.tokenizer(text).input_ids for text in TEXTS]
    settings, finished = settings_with_stops(base, prompts), []
    ours = generate(base.model, base.tokenizer, prompts, **settings, batch_size=9)
    before = base.model.config._attn_implementation
    theirs = continuous.generate(base.model, base.tokenizer, prompts, **settings, **limits, progress=finished.append)
    assert theirs == ours
    assert {output.ended for output in ours} >= {"stop", "length", "end"}
    assert sum(finished) == len(prompts)
    assert base.model.config._attn_implementation == before


def test_too_little_memory_in_continuous_batching_is_an_error_that_halves_batches(tiny_config, monkeypatch, caplog):
    """Its thread catches every error: this must not look like an answer."""
    plain = continuous.ContinuousBatchingConfig

    def limited(num_blocks, **settings):
        if num_blocks > 20:
            raise MemoryError("out of memory")
        return plain(num_blocks=num_blocks, **settings)

    monkeypatch.setattr(continuous, "ContinuousBatchingConfig", limited)
    record = run.main(tiny_config("score.engine=continuous", "score.batch_size=8", "train.steps=2"))
    assert record.scores["validation"].batch_halvings == 1
    assert "score.batch_size=8 is halved to 4" in caplog.text
    base = tiny("tiny_llama")
    monkeypatch.setattr(type(base.model), "forward", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no memory!")))
    with pytest.raises(RuntimeError, match="continuous batching: no memory!"):
        continuous.generate(base.model, base.tokenizer, [[1, 2]], max_new_tokens=3, batch_size=1)


@pytest.mark.parametrize("engine", ["static", "continuous"])
def test_a_run_records_its_engine_and_how_its_answers_compare(tiny_config, tmp_path, engine):
    ours, other = tiny_config("train.steps=2"), tiny_config("train.steps=2", f"score.engine={engine}")
    assert run_id(ours) != run_id(other), "rounding may change texts, so the engine is a part of the identity"
    plain, record = run.main(ours), run.main(other)
    assert plain.scores["validation"].engine is None
    tree = json.loads(folder_of(ours).result_file.read_text())
    assert "engine" not in tree["scores"]["validation"]
    assert "engine" not in tree["identity"]["score"], "old runs keep their ids"
    scores = record.scores["validation"]
    assert (scores.engine.name, scores.engine.compared, scores.engine.same) == (engine, 12, 12)
    assert f"answers by {engine} (" in terminal_lines(record, tmp_path)
    assert "12 of 12 compared answers are those of score.engine=transformers" in terminal_lines(record, tmp_path)
    for name in ("validation.jsonl", "validation.base.jsonl"):
        rows, own = (read_predictions(folder_of(c).path / "predictions" / name) for c in (other, ours))
        assert rows == own
    assert len(list((Path(other.outputs) / "base").glob("chain_sum-validation-[0-9a-f]*.jsonl"))) == 2, "one for each"
    assert folder_of(other).record() == record, "the record is read as it was written"
    findings = verify.verify(folder_of(other).path, rows=4, cache=Path(other.cache))
    assert not [finding for finding in findings if finding.ok is False]
    skipped = [finding for finding in findings if finding.check == "regenerate validation"]
    assert [finding.ok for finding in skipped] == [None]


def test_given_texts_are_compared_by_our_code_under_every_engine(tiny_config, tmp_path):
    for part, split in enumerate(("train", "validation", "test")):
        task_rows.write(
            tmp_path,
            "hellaswag",
            *({**ROW, "ind": 9 * part + number, "ctx_a": f"Man {part} {number} sits."} for number in range(4)),
            split=split,
        )
    config = tiny_config("score.engine=continuous", "train.steps=2", f"data_root={tmp_path}", task="hellaswag")
    assert run.main(config).scores["validation"].engine is None


def test_the_compared_rows_are_spread_over_the_split():
    assert compared_places(5) == [0, 1, 2, 3, 4]
    assert compared_places(160) == list(range(0, 160, 10))


def test_agreement_counts_equal_texts(tiny_config):
    config = tiny_config("train.steps=2")
    run.main(config)
    rows = read_predictions(folder_of(config).predictions_file("validation"))[:4]
    others = [replace(rows[0], output="another"), *rows[1:]]
    record = agreement("continuous", others, rows)
    assert (record.compared, record.same) == (4, 3)
    assert "3 of 4 compared answers" in str(record)
    assert isinstance(record, EngineRecord)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score.engine=vllm"], r"^score\.engine=vllm: tiny/llama is a random model without files; use transformers$"),
        (
            ["score.engine=static", "train.shard=true"],
            r"^score\.engine=static: needs the whole base model on one device",
        ),
        (
            ["score.engine=vllm", "model=gpt2", "model.quantization=nf4"],
            r"^score\.engine=vllm: would load the base model unquantised; .* model\.quantization=nf4$",
        ),
        (["score.engine=vlm"], r"score\.engine=vlm: choose one of transformers, static, continuous, vllm"),
    ],
)
def test_engines_that_cannot_answer_are_refused(tiny_run, words, message):
    with pytest.raises(UserError, match=message):
        compose_config(tiny_run(*words))


def test_a_missing_vllm_is_said_before_anything_is_loaded(tiny_run):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    config = compose_config(tiny_run("model=gpt2", "score.engine=vllm"))
    with pytest.raises(UserError, match=r"vLLM is not installed; run: pip install 'tiedlora\[vllm\]'$"):
        run.main(config)
    assert not folder_of(config).path.exists()


class Completion:
    def __init__(self, token_ids, finish_reason):
        self.token_ids, self.finish_reason = token_ids, finish_reason


def test_what_vllm_returns_becomes_our_output():
    """Only the parts that need no vLLM: the engine itself is untried."""
    tokenizer = tiny("tiny_llama").tokenizer
    ends = vllm_engine.AnswerEnds(tokenizer, ["\n"], 5)
    text, longer = (tuple(tokenizer(words).input_ids) for words in ("ab", "ab\nzz"))
    expected = Output("ab", 3, "end")
    assert vllm_engine._output(Completion((*text, 256), "stop"), ends) == expected
    assert vllm_engine._output(Completion(text, "stop"), ends) == expected, "without the end-of-text token"
    assert vllm_engine._output(Completion(longer, "length"), ends) == Output("ab", 3, "stop")
    more = vllm_engine.AnswerEnds(tokenizer, ["\n"], 5, [7])
    assert vllm_engine._output(Completion((*text, 7), "stop"), more) == expected
    adapter = attach(tiny("tiny_llama").model, "TABuv", 9).adapter
    assert vllm_engine._lora_rank(adapter) == 16
    assert torch.equal(adapter.parts()["qkv.u"], torch.ones(3, 9))
