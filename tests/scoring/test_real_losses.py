"""On short real runs of the embedded model, the recorded losses are those that plain transformers computes."""

import runpy

import pytest

from tiedlora.config.project import PROJECT

pytestmark = pytest.mark.slow

CHECK = runpy.run_path(str(PROJECT / "benchmarks" / "losses.py"))
"""The same check as a program, for longer runs and more seeds."""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One folder, so that the base model is scored once."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(("tying", "kinds"), [("LoRA", ["", ".base"]), ("TABuv", [""])])
def test_the_losses_are_those_of_transformers(outputs, tying, kinds):
    folder = CHECK["train"](tying, seed=0, steps=2, rows=4, characters=3_600, outputs=outputs)
    scores = folder.finished_record().scores
    # The run has moved both losses, so that the check of the adapted model is not one of the base model.
    assert abs(scores["validation"].gain["target_loss"].value) > 0.01
    assert abs(scores["forgetting"].gain["target_loss"].value) > 1e-3
    found = CHECK["differences"](folder, kinds)
    assert len(found) == 2 * len(kinds)
    for name, difference in found.items():
        print(name, difference)
        CHECK["check"](difference)
