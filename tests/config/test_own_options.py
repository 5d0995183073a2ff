"""Options of one's own, in conf/ of the working folder."""

import pytest

from tiedlora.config.compose import compose_config
from tiedlora.errors import UserError
from tiedlora.places import CONF
from tiedlora.sweeps.expand import compose_sweep


@pytest.fixture
def own(tmp_path, monkeypatch):
    """conf/ of a new working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "tying").mkdir(parents=True)
    return tmp_path / "conf"


def test_they_are_options_of_runs_and_sweeps_and_of_messages(own):
    text = (CONF / "tying" / "TAuv.yaml").read_text()
    (own / "tying" / "mine.yaml").write_text(text.replace("name: TAuv", "name: mine"))
    (own / "grid").mkdir()
    (own / "grid" / "two.yaml").write_text("# @package hydra.sweeper.params\ntying: mine,TB\n")
    assert compose_config(["tying=mine"]).tying.name == "mine"
    sweep = compose_sweep(["model=tiny_llama", "+grid=two"])
    assert [cell.config.tying.name for cell in sweep.cells] == ["mine", "TB"]
    with pytest.raises(UserError, match=r"tying=mnie: no such option; choose one of .*, mine \(did you mean mine\?\)"):
        compose_config(["tying=mnie"])


def test_one_that_changes_another_section_does_so_in_a_sweep_too(own):
    (own / "tying" / "mine").mkdir()
    (own / "tying" / "mine" / "fast.yaml").write_text("# @package _global_\ntrain: {steps: 7}\n")
    (own / "score").mkdir()
    (own / "score" / "short.yaml").write_text("# @package _global_\ntrain: {steps: 9}\n")
    for word, steps in (("+tying/mine=fast", 7), ("+score=short", 9)):
        assert compose_config(["model=tiny_llama", word]).train.steps == steps
        sweep = compose_sweep(["model=tiny_llama", word, "seed=0,1"], {})
        assert [cell.config.train.steps for cell in sweep.cells] == [steps, steps]


def test_one_with_the_name_of_another_is_refused_because_it_would_not_be_taken(own):
    text = (CONF / "tying" / "TAuv.yaml").read_text()
    (own / "tying" / "TAuv.yaml").write_text(text)
    assert compose_config(["tying=TAuv"]).tying.name == "TAuv"
    (own / "tying" / "TB.yaml").write_text(text)
    with pytest.raises(UserError, match=r"conf/tying/TB\.yaml: tying=TB is an option of tiedlora; give"):
        compose_config([])


@pytest.mark.parametrize(
    ("file", "option"),
    [("tying/peft/vera", "tying=peft/vera"), ("tying/LoRA_l15", "tying=LoRA_l15"), ("grid/quick", "grid=quick")],
)
def test_so_is_one_with_the_name_of_an_option_that_is_no_file_of_conf(own, file, option):
    path = own / f"{file}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("name: mine\n")
    with pytest.raises(UserError, match=rf"conf/{file}\.yaml: {option} is an option of tiedlora; give"):
        compose_config([])


@pytest.mark.parametrize("flag", [["--config-dir", "options"], ["--config-dir=options", "--multirun"]])
def test_so_is_one_of_a_folder_that_the_command_names(flag, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options" / "tying").mkdir(parents=True)
    (tmp_path / "options" / "tying" / "TB.yaml").write_text("name: TB\n")
    says = "error: options/tying/TB.yaml: tying=TB is an option of tiedlora; give this one another name\n"
    assert script("train.py", *flag, "seed=0") == (2, "", says)


def test_an_option_of_ones_own_may_be_broken(own):
    (own / "tying" / "mine.yaml").write_text("name: [")
    with pytest.raises(UserError, match="is not readable YAML"):
        compose_config(["tying=mine"])


def test_the_axes_of_a_grid_of_ones_own_read_no_secrets(own, monkeypatch):
    """The runs would record their values."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (own / "grid").mkdir()
    text = "# @package _global_\nhydra:\n  sweeper:\n    params: {tracking.group: '${oc.env:HF_TOKEN}'}\n"
    (own / "grid" / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"^\$\{oc\.env:HF_TOKEN\}: a configuration is recorded"):
        compose_sweep(["model=tiny_llama", "+grid=mine"], {})


def test_an_axis_of_a_grid_of_ones_own_may_be_null_or_a_list(own):
    (own / "grid").mkdir()
    values = "tracking.group: null\ntask.shuffle_targets: true\ntask.stop: ['a, b', c]\ntrain.lr: 1.0e-05\nseed: 1,2\n"
    (own / "grid" / "mine.yaml").write_text(f"# @package hydra.sweeper.params\n{values}")
    cell, other = compose_sweep(["model=tiny_llama", "+grid=mine"], {}).cells
    assert (cell.config.tracking.group, cell.config.task.shuffle_targets, cell.config.train.lr) == (None, True, 1e-5)
    assert (cell.config.task.stop, cell.config.seed, other.config.seed) == (["a, b", "c"], 1, 2)
