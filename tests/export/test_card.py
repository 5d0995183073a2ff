"""The model card: the hub's own library reads its scores back with their intervals."""

import pytest
from helpers.report_runs import add_scores, make_config, make_record, prediction_rows
from huggingface_hub import ModelCard

from tiedlora.config.schema import HubSource
from tiedlora.export.card import card

COMMIT = "5503434ddd753f426f4b38109466949a1217c2bb"


def scored(metric="exact_match_strict", split="test", **about):
    rows = prediction_rows([1.0, 0.0, 1.0, 1.0] * 10, metric)
    return add_scores(make_record(**about), split, rows)


def on_hub(revision="main"):
    config = make_config()
    config.task.hub = HubSource("openai/gsm8k", "main", revision, {"train": "train", "test": "test"})
    return config


def of_squad():
    """The configuration of a run whose test rows are only a part of a split of the hub."""
    config = on_hub()
    config.task.hub.splits = {"train": "train", "validation": "validation[:2000]", "test": "validation[2000:]"}
    return config


def test_the_hub_reads_every_score_with_its_interval_from_the_card():
    record, config = scored(), on_hub(COMMIT)
    (result,) = ModelCard(card(record, config, "hub-card", [])).data.eval_results
    interval = record.scores["test"].metrics["exact_match_strict"]
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("openai/gsm8k", "main", "test")
    assert (result.dataset_revision, result.metric_type) == (COMMIT, "exact_match_strict")
    assert result.metric_value == interval.value == 0.75
    assert result.metric_args == {"low": interval.low, "high": interval.high, "level": 0.95, "rows": 40}
    assert f"{interval.low:.3f} to {interval.high:.3f}" in result.metric_name


def test_without_scores_there_is_no_index():
    data = ModelCard(card(make_record(), make_config(), "hub-card", [])).data
    assert data.eval_results is None
    assert data.base_model == "org/tiny"


@pytest.mark.parametrize(
    ("split", "config", "named"),
    [
        ("test", of_squad(), "validation[2000:]"),
        ("validation", on_hub(), "validation, cut out of train"),
        ("test", make_config(), "test"),
    ],
)
def test_the_card_names_the_split_of_the_hub_that_was_scored(split, config, named):
    (result,) = ModelCard(card(scored(split=split), config, "hub-card", [])).data.eval_results
    assert result.dataset_split == named


def test_the_card_names_the_chat_template():
    config = make_config()
    assert "chat template" not in card(scored(), config, "hub-card", [])
    config.task.chat_template = True
    assert "as one user turn of the tokenizer's chat template" in card(scored(), config, "hub-card", [])
