"""The files in examples/ run with the command in their first line."""

import pytest

from tiedlora.config.project import PROJECT

ARGUMENTS = {
    "custom_specification.py": ["{folder}/adapter"],
    "custom_task.py": ["outputs={folder}", "cache={folder}/cache", "train.threads=1"],
    "trainer.py": ["{folder}"],
}
NEEDS_MORE = {"trl_grpo.py"}
"""They need a package or a model that no test has."""
EXPECTED = {
    "custom_specification.py": "loaded back, merged",
    "custom_task.py": "exact_match",
    "trainer.py": "base_model.model.tied_adapter.targets.qkv.B: (1, 96, 4)",
}


def test_all_of_them_are_here():
    assert {*ARGUMENTS, *NEEDS_MORE} == {path.name for path in (PROJECT / "examples").glob("*.py")}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_it_runs(name, tmp_path, script):
    code, out, _ = script(f"examples/{name}", *(argument.format(folder=tmp_path) for argument in ARGUMENTS[name]))
    assert code == 0
    assert EXPECTED[name] in out
