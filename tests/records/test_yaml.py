"""YAML files: what was written is read again."""

import pytest
from omegaconf import OmegaConf

from tiedlora import storage
from tiedlora.config.compose import compose_config, read_config
from tiedlora.config.identity import config_tree
from tiedlora.errors import UserError

TEXTS = [
    *(
        "yes",
        "y",
        "null",
        "~",
        "1e-3",
        "1_000",
        "2024-01-01",
        "1:30",
        "0x1F",
        "nan",
        "inf",
        "9" * 5000,
        "",
        "#x",
        "=",
        "<<",
    ),
    *(
        "a: b",
        "- a",
        "{question}\n\nAnswer:",
        " space ",
        "\ttab",
        "\x07",
        "\u2028",
        "é😀",
        "'",
        '"',
        "\\",
        "long " * 50,
    ),
]


@pytest.mark.parametrize("text", [*TEXTS, "${", "a: ${b", "\\${x}", "Solve ${\\bf x}$", "???", "1._e5", "a\x85b"])
def test_a_text_stays_the_text(text, tmp_path):
    tree = {"a": text, "b": [text, 1, 1e-5, None, True, {}], "c": {text: []}}
    storage.write_yaml(tmp_path / "tree.yaml", tree)
    assert storage.read_yaml(tmp_path / "tree.yaml") == tree


@pytest.mark.parametrize("text", TEXTS)
def test_the_files_are_those_that_earlier_versions_have_written(text, tmp_path):
    tree = {"a": text, "b": [text, 1, 1e-5, None, True, {}], "c": {text: []}}
    storage.write_yaml(tmp_path / "tree.yaml", tree)
    assert (tmp_path / "tree.yaml").read_text() == OmegaConf.to_yaml(tree)


def test_a_configuration_may_hold_what_looks_like_an_interpolation(tmp_path):
    words = [r"task.stop=['\${']", r'task.prompt="Solve \${\\bf {question}}$"', "model=tiny_llama"]
    config = compose_config(words)
    assert config.task.stop == ["${"]
    storage.write_yaml(tmp_path / "config.yaml", config_tree(config))
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "value", ["!!bool maybe", "!!timestamp x", "!!int ''", "!!int x", "!!python/object:os.system x"]
)
def test_a_value_that_its_tag_does_not_have_is_one_line(value, tmp_path):
    (tmp_path / "tree.yaml").write_text(f"a: {value}\n")
    with pytest.raises(UserError, match=r"^\S+/tree\.yaml: is not readable YAML \(.+\)$"):
        storage.read_yaml(tmp_path / "tree.yaml")
