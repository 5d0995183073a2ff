"""Composing a configuration: the options of conf/, and one line that names the key of each mistake."""

import dataclasses

import pytest
from helpers.hostile import ODD_VALUES, refused, right_or_refused, search
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tiedlora.config import compose as configuration
from tiedlora.config.compose import compose_config
from tiedlora.config.explain import options, peft_options, schema_keys
from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.keys import from_person, help_of, sections
from tiedlora.other_methods import TyingConfig, peft_class
from tiedlora.places import CONF, PROJECT
from tiedlora.runs import run

SECRET = "hunter2-0123456789abcdef0123456789abcdef"
"""Whether this is OmegaConf 2.4, which has other messages."""

MISTAKES = {  # one for each rule: overrides, and how the message begins
    "an option that is none": (["tying=TABvu"], "tying=TABvu: no such option; choose one of LoRA, LoRA_qkv"),
    "a bare number for an option": (["rank=8"], "a group takes the name of an option, not a bare number: rank=r8"),
    "a key that is none": (["train.stpes=3"], "train.stpes: unknown key (did you mean train.steps?)"),
    "a key of Hydra's instantiation": (["+_target_=os.system"], "_target_: unknown key"),
    "what is no override": (["a=b=c"], "a=b=c: cannot be parsed as KEY=VALUE"),
    "a group taken away": (["~model"], "model.name: has no value"),
    # Types
    "a word for a number": (["train.steps=many"], "train.steps=many: must be a valid integer"),
    "a mapping for a list": (["train.betas={a: 1}"], "train.betas: must be a list, as in [A,B]. Adam's"),
    "a list for an item": (["tying.targets=[[]]"], "tying.targets.0=[]: must be a valid string"),
    "null for a number": (["seed=null"], "seed=null: must be a valid integer"),
    "more digits than are read": ([f"seed={'9' * 5000}"], "a number has more digits than are read"),
    # Rules of one key
    "too little": (["train.steps=0"], "train.steps=0: must be greater than or equal to 1"),
    "too much": (["score.batch_size=65537"], "score.batch_size=65537: must be less than or equal to 65536"),
    "no number": (["train.lr=nan"], "train.lr=nan: must be a finite number"),
    "no choice, with the help of the key": (
        ["train.dtype=half"],
        "train.dtype=half: must be 'float32' or 'bfloat16'. Number type of the frozen base",
    ),
    "a typo": (["train.schedule=cosin"], "train.schedule=cosin: must be 'cosine' or 'constant' (did you mean cosine?"),
    "no option": (["tracking.backend=aim"], "tracking.backend=aim: choose one of auto, mlflow, none, trackio, wandb"),
    "a path for a name": (["task.name=../../x"], "task.name=../../x: use letters"),
    "a control character": (['task.prompt="a\x1b[2J{question}"'], "task.prompt=a␛[2J{question}: holds a control"),
    "no terms": (["tying=RaSA", "tying.terms={}"], "tying.terms={}: an empty mapping is merged into the present one"),
    # Rules of items, and of several keys
    "a split that is none": (["task.hub.splits.evil=a"], "task.hub.splits.evil=evil: choose one of train, validation"),
    "a split that is trained on": (["score.splits=[train]"], "score.splits.0=train: choose one of validation, test. "),
    "a split twice": (["score.splits=[test,test]"], "score.splits=['test', 'test']: names test twice; name each once"),
    "a metric twice": (["score.metrics=[accuracy,accuracy]"], "score.metrics=['accuracy', 'accuracy']: names accuracy"),
    "a grid without a plus": (["grid=paper"], "grid: unknown key; a grid is added as +grid=NAME, and several as"),
    "a rank of no option": (["rank=r16"], "rank=r16: no such option; choose one of r1, r128, r2, r32, r8, or set"),
    "a long tag": ([f"tracking.tags=[{'x' * 65}]"], f"tracking.tags.0={'x' * 60}: must match pattern '^.{{1,64}}$'"),
    "a stop text that always matches": (["task.stop=['']"], "task.stop.0=: is empty"),
    "one beta": (["train.betas=[0.9]"], "train.betas=[0.9]: must have at least 2 items"),
    "a beta of one": (["train.betas=[1.0,0.9]"], "train.betas.0=1.0: must be less than 1"),
    "a device that is none": (["train.device=xyz"], "train.device=xyz: choose auto, cpu, cuda or cuda:NUMBER"),
    "a device beyond torch's numbers": (["train.device=cuda:256"], "train.device=cuda:256: choose auto, cpu, cuda or"),
    "a long warm-up": (["train.warmup_steps=1000"], "train.warmup_steps=1000: is more than train.steps=80; lower"),
    "nothing trained": (["tying=TB", "train.lr_factor.B=0"], "train.lr_factor: is 0 for every trained part"),
    "rank above the projection": (["rank.r=100000"], "rank.r=100000: is more than a projection's"),
    "heads that share nothing": (["model.architecture.kv_heads=2"], "model.architecture.kv_heads=2: must divide heads"),
    "no adapter": (["train.init_from=nowhere"], "nowhere: is neither a finished run nor an adapter's folder"),
    # Random models
    "one that fills the memory": (
        ["model=tiny_llama", "model.architecture.vocabulary=100000000"],
        "model.architecture: a random model of about 6,4",
    ),
    "an odd head": (["model=tiny_llama", "model.architecture.head_dim=7"], "model.architecture.head_dim=7: must be"),
    "heads that do not fill": (
        ["model=tiny_gpt2", "model.architecture.heads=3", "model.architecture.kv_heads=3"],
        "model.architecture.hidden=32: must be heads x",
    ),
    # Interpolations
    "a secret of the environment": (
        ["tracking.group='${oc.env:TIEDLORA_X,${oc.env:WANDB_API_KEY}}'"],
        "${oc.env:WANDB_API_KEY}: a configuration is recorded",
    ),
    "a secret by a name put together": (
        ["tracking.group=env", "tracking.project='${oc.${tracking.group}:WANDB_API_KEY}'"],
        "${oc.env:WANDB_API_KEY}: a configuration is recorded",
    ),
    "a value of itself": (["seed=${seed}"], "seed: Recursive interpolation"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_one_line_names_the_key(what, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    overrides, says = MISTAKES[what]
    with pytest.raises(UserError) as caught:
        compose_config(overrides)
    assert str(caught.value).startswith(says)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", schema_keys())
def test_every_key_has_help(name):
    assert help_of(name, schema_keys())


@dataclasses.dataclass
class Undescribed:
    described: int = 1
    """Its help,
    on two lines."""
    bare: str = '"""not its help"""'

    def method(self) -> None:
        """Nor is this."""


def test_help_is_the_docstring_below_the_field_and_no_other():
    keys = sections(Undescribed())
    assert [help_of(key, keys) for key in keys] == ["Its help, on two lines.", ""]


OPTIONS = [path for path in sorted(CONF.glob("*/**/*.yaml")) if path.parent.parent != CONF / "hydra"]
SIZES_OF_OWN = (
    "{family: llama, layers: 1, hidden: 8, heads: 1, kv_heads: 1, head_dim: 8, intermediate: 8, vocabulary: 8}"
)
NEEDS_MORE = {
    "tying=peft": ["tying.method=VeraConfig"],
    "model=hub": ["model.name=a/b", "model.context=9", f"model.architecture={SIZES_OF_OWN}"],
}


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.relative_to(CONF).with_suffix("").as_posix())
def test_every_option_composes_and_opens_with_its_command(path):
    group, _, option = path.relative_to(CONF).with_suffix("").as_posix().partition("/")
    first = path.read_text().splitlines()[0]
    assert first.startswith("# python scripts/params.py" if option == "gpt2b_001" else "# python train.py")
    assert f"{group}={option}" in first
    config = compose_config([f"{group}={option}", *NEEDS_MORE.get(f"{group}={option}", [])])
    assert config.rank.alpha is not None
    assert config.train.lr is not None


def test_hydra_knows_each_method_of_the_table_as_an_option():
    configuration.register()
    with initialize_config_dir(config_dir=str(CONF), **configuration.VERSION_BASE):
        listed = GlobalHydra.instance().config_loader().get_group_options("tying/peft")
    assert {f"peft/{name}" for name in listed} == {name for name in options("tying") if "/" in name}
    for option, node in peft_options().items():
        tying = from_person(TyingConfig, node)
        assert tying.name == option
        assert peft_class(tying.method).__name__ == tying.method


def test_paths_are_those_of_the_project_wherever_it_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compose_config([]).outputs == str(PROJECT / "outputs")
    assert compose_config(["outputs=here"]).outputs == str(tmp_path / "here")


def test_an_infinite_value_has_no_id():
    config = compose_config(["model=tiny_llama", "+task.options.odd=inf"])
    with pytest.raises(UserError, match="infinite or no number"):
        run_id(config)


SIZES = b"context: 9, architecture: {layers: 1, hidden: 1, heads: 1, kv_heads: 1, head_dim: 1}"
PLAIN = b"model: {name: m, " + SIZES + b"}\ntask: {name: t, kind: k, prompt: p, target: t}\n"
FILES = {  # contents of a config.yaml that a command line cannot have
    "a tag of Python": (b"seed: !!python/object/apply:os.system ['touch owned']\n", "is not readable YAML"),
    "no mapping": (b"- 1\n- 2\n", "must hold a YAML mapping"),
    "nothing": (b"", "must hold a YAML mapping"),
    "not UTF-8": (b"seed: \xff\xfe\n", "is not readable YAML"),
    "thousands of brackets": (b"task: " + b"[" * 1500, "is not readable YAML"),
    "a key twice": (b"seed: 1\nseed: 2\n", "is not readable YAML"),
    "a key that is a number": (b"1: 2\n", "1: unknown key"),
    "a surrogate by escape": (PLAIN + b'tracking: {group: "\\ud800"}\n', "invalid Unicode"),
    "an interpolation, which stays text": (
        PLAIN + b"tracking: {project: '${oc.env:WANDB_API_KEY}'}\n",
        "tracking.project=${oc.env:WANDB_API_KEY}: ",
    ),
    "texts that double": (
        PLAIN + b"".join(b"k%d: '${k%d}${k%d}'\n" % (n, n + 1, n + 1) for n in range(50)) + b"k50: xx\n",
        "k0: unknown key",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_a_wrong_file_is_named(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    data, says = FILES[what]
    (tmp_path / "config.yaml").write_bytes(data)
    with refused(says, tmp_path) as caught:
        configuration.read_config(tmp_path / "config.yaml")
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_a_file_of_conf_that_is_no_yaml(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("defaults: [schema\n")
    monkeypatch.setattr(configuration, "CONF", tmp_path)
    with refused("is not readable YAML"):
        compose_config([])


@pytest.mark.slow
def test_no_secret_is_in_anything_a_run_writes(tiny_config, tmp_path, monkeypatch):
    """Variables that W&B, the hub and clouds read. The run also logs to W&B, offline."""
    names = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")
    for number, name in enumerate(names):
        monkeypatch.setenv(name, f"{number}{SECRET[:39]}"[:40])
    record = run.main(tiny_config("tracking=wandb", "train.steps=2"))
    folder = tmp_path / "outputs" / record.run_id
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"result.json", "config.yaml", "metrics.jsonl"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in folder.rglob("*"))
    for path in written:
        assert SECRET[:30].encode() not in path.read_bytes(), path


WORDS = st.builds(
    lambda sign, key, equals, value: f"{sign}{key}{equals}{value}",
    st.sampled_from(["", "", "", "+", "++", "~"]),
    st.sampled_from([*schema_keys(), "hydra.run.dir", "evil", "tying", "model", "", "train.steps.x"]),
    st.sampled_from(["=", "=", "=", "", "=="]),
    ODD_VALUES.map(lambda value: str(value)) | st.text(max_size=30),
)


@given(st.lists(WORDS, min_size=1, max_size=3))
@search(20)
def test_any_overrides_compose_or_are_refused(words):
    with right_or_refused():
        config = compose_config(words)
        assert isinstance(config, Config)


@given(st.lists(st.tuples(st.sampled_from(sorted(schema_keys())), ODD_VALUES), min_size=1, max_size=3))
@search(40)
def test_any_values_load_or_are_refused(tmp_path_factory, changes):
    values = OmegaConf.to_container(OmegaConf.create(dataclasses.asdict(compose_config(["model=tiny_llama"]))))
    for key, value in changes:
        node = values
        *parents, last = key.split(".")
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[last] = value
    with right_or_refused():
        path = tmp_path_factory.getbasetemp() / "values.yaml"
        try:
            path.write_text(OmegaConf.to_yaml(OmegaConf.create(values)), encoding="utf-8")
        except Exception:
            return  # OmegaConf cannot write such a value
        assert "/" not in run_id(configuration.read_config(path))


def test_more_scores_of_a_run_come_from_the_rows_that_it_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TIEDLORA_DATA", "others")
    config = compose_config([f"data_root={tmp_path}"])
    assert configuration.rows_are_in(config, None) == str(tmp_path)
    config.data_root = "folder of another machine"
    assert [configuration.rows_are_in(config, where) for where in (None, "given")] == ["others", "given"]


def test_a_grid_is_a_sweep_also_without_the_flag():
    grids = sorted((PROJECT / "sweeps" / "grid").glob("*.yaml"))
    assert len(grids) > 5
    for path in grids:
        assert OmegaConf.load(path).hydra.mode == "MULTIRUN", path.name
