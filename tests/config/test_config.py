"""A wrong configuration gives one line that names the key."""

import pytest
from omegaconf import OmegaConf

from tiedlora.config import compose as configuration
from tiedlora.config.compose import CONF, compose_config
from tiedlora.config.identity import config_tree, run_id
from tiedlora.errors import UserError


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tying=TABXY", r"tying=TABXY: no such option; choose one of LoRA,.*TABuv"),
        ("tying=TABvu", r"did you mean TABuv\?"),
        ("rank=8", r"rank=r8 selects one, rank.r=8 sets"),
        ("rank.r=0", r"rank.r=0: must be at least 1"),
        ("rank.r=100000", r"rank.r=100000: is more than"),
        ("train.stpes=3", r"train.stpes: unknown key \(did you mean train.steps\?\)"),
        ("+train.stpes=3", r"train.stpes: unknown key \(did you mean train.steps\?\)"),
        ("+nonsense=3", r"nonsense: unknown key"),
        ("tying.A.sahre=3", r"tying.A.sahre: unknown key \(did you mean tying.A.share\?\)"),
        ("train.steps=many", r"train.steps: .*many.*Integer"),
        ("train.steps=0", r"train.steps=0: must be at least 1"),
        ("train.lr=-1", r"train.lr=-1"),
        ("train.lr=nan", r"train.lr=nan"),
        ("train.warmup_steps=1000", r"train.warmup_steps=1000: is more than train.steps"),
        ("train.dtype=float61", r"train.dtype=float61: choose one of float32, bfloat16"),
        ("train.schedule=cosin", r"did you mean cosine\?"),
        ("train.betas=[0.9]", r"train.betas"),
        ("train.betas=[0.9,1.0]", r"train.betas"),
        ("score.splits=[train]", r"score.splits=train"),
        ("score.checkpoint=first", r"score.checkpoint=first"),
        ("seed=-1", r"seed=-1"),
        ("tracking.backend=aim", r"tracking.backend=aim"),
        ("model.name=../../etc", r"model.name"),
        ("task.name='a b'", r"task.name"),
        ("task.rows.train=0", r"task.rows.train=0"),
        ("tying.B.trained=false", r"tying.B: starts at zero and is frozen"),
        ("a=b=c", r"a=b=c: cannot be parsed"),
    ],
)
def test_one_line_names_the_key(override, says):
    with pytest.raises(UserError, match=says) as caught:
        compose_config([override])
    assert "\n" not in str(caught.value)


def test_all_factors_at_zero_would_train_nothing():
    with pytest.raises(UserError, match=r"train\.lr_factor"):
        compose_config(["tying=TB", "train.lr_factor.B=0"])


OPTIONS = [path for path in sorted(CONF.glob("*/**/*.yaml")) if path.parent.parent != CONF / "hydra"]
NEEDS_MORE = {"tying=peft": ["tying.method=VeraConfig"]}


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.relative_to(CONF).with_suffix("").as_posix())
def test_every_option_composes_and_opens_with_its_command(path):
    group, _, option = path.relative_to(CONF).with_suffix("").as_posix().partition("/")
    first = path.read_text().splitlines()[0]
    assert first.startswith("# python train.py")
    assert f"{group}={option}" in first
    config = compose_config([f"{group}={option}", *NEEDS_MORE.get(f"{group}={option}", [])])
    assert config.rank.alpha is not None
    assert config.train.lr is not None


def test_every_field_of_a_group_can_be_set_without_a_plus():
    config = compose_config(["train.eps=1e-7", "tying.A.share=4", "task.hub.revision=x", "score.base=false"])
    assert (config.train.eps, config.tying.A.share, config.score.base) == (1e-7, 4, False)


def test_options_that_leave_the_rate_open_take_the_suggested_one():
    assert compose_config(["tying=Tuv"]).train.lr == 3e-2
    assert compose_config(["tying=LoRA"]).train.lr == 3e-3
    assert compose_config(["tying=Tuv", "train.lr=1"]).train.lr == 1


def test_a_saved_configuration_loads_back_to_the_same():
    config = compose_config(["tying=TA", "rank.r=3", "seed=5"])
    again = configuration.load(OmegaConf.create(OmegaConf.to_yaml(config_tree(config))))
    assert again == config


def test_paths_are_those_of_the_project_wherever_it_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compose_config([]).outputs == str(configuration.PROJECT / "outputs")
    assert compose_config(["outputs=here"]).outputs == str(tmp_path / "here")


def test_an_infinite_value_has_no_id():
    config = compose_config(["model=tiny_llama", "+task.options.odd=inf"])
    with pytest.raises(UserError, match="infinite or no number"):
        run_id(config)
