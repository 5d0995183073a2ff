"""On short real runs of the embedded model, the recorded losses are those that plain transformers computes."""

import runpy

import pytest

from tiedlora.config.project import PROJECT

CHECK = runpy.run_path(str(PROJECT / "benchmarks" / "losses.py"))
"""The same check as a program, for longer runs and more seeds."""


@pytest.fixture(scope="module", params=["LoRA", "TABuv"])
def folder(request, tmp_path_factory):
    return CHECK["train"](request.param, seed=0, steps=2, rows=6, outputs=tmp_path_factory.mktemp("runs"))


def test_the_losses_are_those_of_transformers(folder):
    scores = folder.finished_record().scores["validation"]
    # The run has moved the loss, so that the check of the adapted model is not one of the base model.
    assert abs(scores.gain["target_loss"].value) > 0.01
    found = CHECK["differences"](folder)
    assert list(found) == ["target_loss", "target_loss.base"]
    for name, difference in found.items():
        print(name, difference)
        CHECK["check"](difference)
