"""Malformed configurations: a table of them with their messages, and a search for more."""

import dataclasses
import os

import omegaconf
import pytest
from helpers import processes
from helpers.hostile import ODD_VALUES, refused, right_or_refused, search
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tiedlora.config import compose as configuration
from tiedlora.config.compose import compose_config
from tiedlora.config.describe import schema_keys
from tiedlora.config.project import PROJECT
from tiedlora.config.schema import Config
from tiedlora.runs import run

SECRET = "hunter2-0123456789abcdef0123456789abcdef"
HUGE = "9" * 5000
NEXT = omegaconf.__version__ >= "2.4"
"""Whether these are Hydra 1.4 and OmegaConf 2.4, which have other messages."""

TABLE = {
    # Unknown keys and options
    "unknown key": ("train.stepz=3", "train.stepz: unknown key (did you mean train.steps?)"),
    "unknown key, added": ("+evil=1", "evil: unknown key"),
    "a key of Hydra's instantiation": ("+_target_=os.system", "_target_: unknown key"),
    "unknown option": ("tying=TABXY", "no such option; choose one of"),
    "an option outside conf/": ("tying=../../etc/passwd", "Parent traversal" if NEXT else "no such option;"),
    "unknown group": ("evil@train=x", "config group 'evil' does not exist"),
    # What cannot be parsed
    "nothing": ("", "cannot be parsed as KEY=VALUE"),
    "no key": ("=", "Could not override ''"),
    "an open bracket": ("task.stop=[", "cannot be parsed as KEY=VALUE"),
    "three thousand brackets": ("task.stop=" + "[" * 3000, "cannot be parsed as KEY=VALUE"),
    "an open interpolation": ("task.prompt='${'", "task.prompt: no viable alternative"),
    "a line feed in a key": ("key\nwith=1", "cannot be parsed as KEY=VALUE"),
    "half of a surrogate pair": ("task.prompt=\ud800", "cannot be parsed as KEY=VALUE"),
    # Wrong types
    "a word for a number": ("train.steps=many", "train.steps: Value 'many'"),
    "a fraction for a whole number": ("seed=1.5", "seed: Value '1.5'"),
    "a flag for a number": ("seed=true", "seed: Value 'True'"),
    "a list for a number": ("seed=[0,1]", "seed: Value '[0, 1]'"),
    "a mapping for a text": ("task.prompt={a: b}", "task.prompt: Cannot convert 'dict' to string"),
    "a mapping for a list": ("train.betas={a: 1}", "train.betas: Cannot merge"),
    "a word for a flag": ("train.bucket=maybe", "train.bucket: Value 'maybe' is not a valid bool"),
    "a key below a number": ("++train.steps.x=3", "train.steps: Value '{}'"),
    "a list for a target": ("tying.targets=[[]]", "tying.targets=[[]]: holds a list where"),
    "a list for a beta": ("train.betas=[[],0.9]", "train.betas"),
    "null for a number": ("seed=null", "seed: field 'seed' is not Optional"),
    "null for a list": ("score.splits=null", "score.splits: field 'score.splits' is not Optional"),
    "null for a section": ("train.lr_factor=null", "train.lr_factor: field 'train.lr_factor' is not Optional"),
    "null for a group": ("train=null", "a group takes the name of an option"),
    "a group taken away": ("~model", "model.name: has no value"),
    # Numbers out of range
    "not a number": ("train.lr=nan", "train.lr=nan: must be at least"),
    "infinite": ("train.lr=inf", "train.lr=inf: must be at most"),
    "infinite for a whole number": ("train.steps=1e400", "train.steps: Value 'inf'"),
    "more digits than are read": (f"seed={HUGE}", "a number has more digits than are read"),
    "a whole number beyond any fraction": (f"train.lr={'9' * 400}", "train.lr: int too large to convert to float"),
    "negative rank": ("rank.r=-1", "rank.r=-1: must be at least 1"),
    "huge rank": ("rank.r=1000000000000", "rank.r=1000000000000: must be at most"),
    "rank above the projection": ("rank.r=100000", "rank.r=100000: is more than the projection's"),
    "alpha of no sign": ("rank.alpha=0", "rank.alpha=0.0: must be at least"),
    "negative steps": ("train.steps=-1", "train.steps=-1: must be at least 1"),
    "huge steps": ("train.steps=10000000000", "train.steps=10000000000: must be at most"),
    "no batch": ("train.batch_size=0", "train.batch_size=0: must be at least 1"),
    "huge batch": ("train.batch_size=10000000000000", "train.batch_size=10000000000000: must be at most"),
    "huge scoring batch": ("score.batch_size=1000000", "score.batch_size=1000000: must be at most"),
    "huge answers": ("task.max_new_tokens=1000000", "task.max_new_tokens=1000000: must be at most"),
    "negative split seed": ("task.split_seed=-1", "task.split_seed=-1: must be at least 0"),
    "huge layer count": ("model.architecture.layers=1000000", "layers=1000000: must be at most"),
    "huge hidden size": ("model.architecture.hidden=1000000000000", "hidden=1000000000000: must be at most"),
    "negative heads": ("model.architecture.heads=-1", "heads=-1: must be at least 1"),
    "heads that share nothing": ("model.architecture.kv_heads=2", "kv_heads=2: must divide heads=9"),
    "an init that overflows": ("tying.A.init=1e308", "tying.A.init=1e+308: must be a finite number"),
    "an init that is none": ("tying.u.init=nan", "tying.u.init=nan: must be a finite number"),
    "a factor that overflows": ("train.lr_factor.A=1e300", "train.lr_factor.A=1e+300: must be at most 1,000,000"),
    "betas of one": ("train.betas=[1.0,1.0]", "train.betas=[1.0, 1.0]"),
    "a share of nothing": ("tying.A.share=0", "tying.A.share=0: choose all"),
    "dropout of everything": ("tying.dropout=1", "tying.dropout=1.0: must be in [0, 1)"),
    "no target": ("tying.targets=[]", "tying.targets: is empty"),
    "a target that is no projection": ("tying.targets=[os]", "'os' is not a projection"),
    "a split that is trained on": ("score.splits=[train]", "score.splits=train"),
    "a device that is none": ("train.device=xyz", "train.device=xyz: choose auto, cpu, cuda or cuda:NUMBER"),
    "a stop text that always matches": ("task.stop=['']", "task.stop: holds an empty text"),
    # Names that become paths or addresses
    "traversal in a task's name": ("task.name=../../x", "task.name='../../x': use letters"),
    "traversal in a model's name": ("model.name=../../x", "model.name='../../x': use letters"),
    "traversal in a revision": ("model.revision=../../x", "model.revision='../../x': use letters"),
    "traversal in a tying's name": ("tying.name=../x", "tying.name='../x': use letters"),
    "traversal in the rows' folder": ("task.folder=../../etc", "task.folder='../../etc': use letters"),
    "an absolute rows' folder": ("task.folder=/etc", "task.folder='/etc': use letters"),
    "traversal in a hub id": ("task.hub.id=../../x", "task.hub.id='../../x': use letters"),
    "traversal in a split's name": ("+task.hub.splits.x/y=train", "cannot be parsed as KEY=VALUE"),
    "a split that is none": ("+task.hub.splits.evil=train", "task.hub.splits: has 'evil'"),
    "traversal in a W&B project": ("tracking.project=../../x", "tracking.project='../../x': use letters"),
    "traversal in a W&B entity": ("tracking.entity=../../x", "tracking.entity='../../x': use letters"),
    "a W&B tag too long": (f"tracking.tags=[{'x' * 65}]", "W&B takes 1 to 64 characters a tag"),
    # Texts
    "control characters in a prompt": ('task.prompt="a\x1b[2J{question}"', "holds a control character"),
    "a null byte in a path": ('outputs="a\x00b"', "outputs='"),
    "a bidirectional override": (
        'tracking.group="\u202eabc"',
        "tracking.group='\\u202eabc': holds a control character",
    ),
    "a prompt without end": (f"task.prompt={'x' * 200_000}", "task.prompt: has 200,000 characters"),
    "an adapter's path too long": (f"train.init_from={'x' * 5000}", "is neither a finished run nor an adapter"),
    # Interpolations
    "a secret of the environment": ("tracking.group=${oc.env:WANDB_API_KEY}", "may read TIEDLORA_"),
    "a secret for a number": ("train.steps=${oc.env:WANDB_API_KEY}", "may read TIEDLORA_"),
    "a secret in a path": ("outputs=/tmp/${oc.env:WANDB_API_KEY}", "may read TIEDLORA_"),
    "a secret as a default": ("tracking.group='${oc.env:TIEDLORA_X,${oc.env:WANDB_API_KEY}}'", "may read TIEDLORA_"),
    "a value of itself": ("seed=${seed}", "seed: Recursive interpolation"),
    "a value of nothing": ("train.steps=${nothing}", "Interpolation key 'nothing' not found"),
    "a resolver of nothing": ("task.prompt=${evil:1}", "Unsupported interpolation type evil"),
}


@pytest.mark.parametrize("what", TABLE)
def test_a_wrong_override_names_its_key(what, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    override, says = TABLE[what]
    with refused(says) as caught:
        compose_config([override])
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


RANDOM = {
    "a random model that fills the memory": (["model.architecture.vocabulary=100000000"], "they are for tests"),
    "many layers": (["model.architecture.layers=9999", "model.architecture.intermediate=10000000"], "are for tests"),
    "a head that no rotation fits": (["model.architecture.head_dim=7"], "head_dim=7: must be even"),
    "heads that do not fill": (["model=tiny_gpt2", "model.architecture.heads=3"], "hidden=32: must be heads x"),
}


@pytest.mark.parametrize("what", RANDOM)
def test_a_random_model_that_cannot_be_made(what):
    overrides, says = RANDOM[what]
    if what == "heads that do not fill":
        overrides = [*overrides, "model.architecture.kv_heads=3"]
    with refused(says):
        compose_config(["model=tiny_llama", *overrides])


PLAIN = b"model: {name: m}\ntask: {name: t, kind: k, prompt: p, target: t}\n"
# Contents of a config.yaml that a command line cannot have.
FILES = {
    "a tag of Python": (b"seed: !!python/object/apply:os.system ['touch owned']\n", "is not readable YAML"),
    "a tag of a Python name": (b"seed: !!python/name:os.system\n", "is not readable YAML"),
    "aliases that unfold": (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [*%c,*%c]\n" % (c, c, c - 1, c - 1) for c in b"bcdefg"),
        "has YAML aliases",
    ),
    "no mapping": (b"- 1\n- 2\n", "must hold a YAML mapping"),
    "nothing": (b"", "model.name: has no value"),
    "a number": (b"3\n", "must hold a YAML mapping"),
    "not UTF-8": (b"seed: \xff\xfe\n", "is not readable YAML"),
    "control characters": (b"seed: \x1b[2J\n", "is not readable YAML"),
    "null bytes": (b"\x00\x00\x00", "is not readable YAML"),
    "cut short": (b"task: {name: x, prompt: 'abc", "is not readable YAML"),
    "a million brackets": (b"task: " + b"[" * 1_000_000, "is nested more than 50 levels deep"),
    "a key twice": (b"seed: 1\nseed: 2\n", "is not readable YAML"),
    "a key that is a number": (b"1: 2\n", "1: unknown key"),
    "an unknown key": (b"evil: 1\n", "evil: unknown key"),
    "a surrogate by escape": (PLAIN + b'tracking: {group: "\\ud800"}\n', "invalid Unicode" if NEXT else "surrogate"),
    "an escape for a terminal": (PLAIN + b'tracking: {group: "\\e[2J"}\n', "holds a control character"),
    "a secret of the environment": (b"tracking: {group: '${oc.env:WANDB_API_KEY}'}\n", "may read TIEDLORA_"),
    "a secret by a name put together": (
        b"tracking: {group: env, project: '${oc.${tracking.group}:WANDB_API_KEY}'}\n",
        "may read TIEDLORA_",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_a_wrong_file_is_named(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    data, says = FILES[what]
    (tmp_path / "config.yaml").write_bytes(data)
    with refused(says, tmp_path) as caught:
        values = configuration.read_config(tmp_path / "config.yaml")
        assert values is None, "it was read"
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "endless").symlink_to("/dev/zero")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(10**12)
    for name in ("pipe", "folder", "endless"):
        with refused("is not a regular file"):
            configuration.read_config(tmp_path / name)
    for name, says in (("loop", "cannot be read"), ("none", "is missing"), ("huge", "at most 1,048,576 are read")):
        with refused(says):
            configuration.read_config(tmp_path / name)


def test_a_file_of_conf_that_is_no_yaml(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("defaults: [schema\n")
    monkeypatch.setattr(configuration, "CONF", tmp_path)
    with refused("is not readable YAML"):
        compose_config([])


def test_the_command_ends_in_one_line_and_writes_nothing(tmp_path):
    for override in ("train.lr=nan", "task.prompt=\x1b[2J", f"seed={HUGE}", "a\nb=c", f"outputs={'x' * 5000}/y"):
        done = processes.run_python(
            PROJECT / "train.py", "model=tiny_llama", f"outputs={tmp_path}/outputs", override, cwd=tmp_path
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
        assert "\x1b" not in done.stderr
        assert list(tmp_path.iterdir()) == []


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


def keys_and_defaults() -> list[str]:
    return [*schema_keys(), "hydra.run.dir", "evil", "tying", "model", "", "train.steps.x"]


WORDS = st.builds(
    lambda sign, key, equals, value: f"{sign}{key}{equals}{value}",
    st.sampled_from(["", "", "", "+", "++", "~"]),
    st.sampled_from(keys_and_defaults()),
    st.sampled_from(["=", "=", "=", "", "=="]),
    ODD_VALUES.map(lambda value: str(value)) | st.text(max_size=30),
)


@given(st.lists(WORDS, min_size=1, max_size=3))
@search(20)
def test_any_overrides_compose_or_are_refused(words):
    with right_or_refused():
        config = compose_config(words)
        assert isinstance(config, Config)


GOOD = None


def good() -> dict:
    global GOOD
    GOOD = GOOD or dataclasses.asdict(compose_config(["model=tiny_llama"]))
    return OmegaConf.to_container(OmegaConf.create(GOOD))


@given(st.lists(st.tuples(st.sampled_from(sorted(schema_keys())), ODD_VALUES), min_size=1, max_size=3))
@search(40)
def test_any_values_load_or_are_refused(tmp_path_factory, changes):
    """A config.yaml with values of any kind at any place, as the run of a stranger may have."""
    values = good()
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
        config = configuration.read_config(path)
        from tiedlora.config.identity import run_id

        assert "/" not in run_id(config)


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
@search(60)
def test_any_bytes_load_or_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_bytes(data)
    with right_or_refused():
        configuration.read_config(path)
    assert path.read_bytes() == data
