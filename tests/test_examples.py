"""The files in examples/ run with the command in their first line."""

import pytest

from tiedlora.places import PROJECT

EXAMPLES = {  # name -> (its words, what it prints)
    "custom_specification.py": (["{folder}/adapter"], "loaded back, merged"),
    "custom_task.py": (["outputs={folder}", "cache={folder}/cache", "train.threads=1"], "letters_in_place"),
    "trainer.py": (["{folder}"], "base_model.model.tied_adapter.targets.qkv.B: (1, 96, 4)"),
}
NEEDS_MORE = {"trl_grpo.py"}
"""They need a package or a model that no test has."""


def test_every_example_is_tested_or_needs_more():
    assert {*EXAMPLES, *NEEDS_MORE} == {path.name for path in (PROJECT / "examples").glob("*.py")}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_says_what_it_shows(name, tmp_path, script):
    words, says = EXAMPLES[name]
    code, out, _ = script(f"examples/{name}", *(word.format(folder=tmp_path) for word in words))
    assert code == 0
    assert says in out
