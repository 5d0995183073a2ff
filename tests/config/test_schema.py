"""The schema is the only place that declares a key, and its choices are those that the code implements."""

import pytest

from tiedlora.config.compose import compose_config
from tiedlora.config.describe import describe_key, schema_keys
from tiedlora.config.explain import options
from tiedlora.config.project import PROJECT
from tiedlora.errors import UserError
from tiedlora.training.optimizer import OPTIMIZERS, SCHEDULES
from tiedlora.tying import PARTS


@pytest.mark.parametrize("name", schema_keys())
def test_every_key_has_help(name):
    assert describe_key(name).help


def test_optimizers_and_schedules_are_the_schemas_choices():
    assert set(OPTIMIZERS) == set(describe_key("train.optimizer").choices)
    assert set(SCHEDULES) == set(describe_key("train.schedule").choices)


def test_a_tracker_is_one_file_and_one_option():
    """Each option of conf/tracking but `none` and `auto` is a module with a TRACKER, and the other way round."""
    folder = PROJECT / "src" / "tiedlora" / "tracking"
    modules = {path.stem for path in folder.glob("*.py") if "\nTRACKER = " in path.read_text(encoding="utf-8")}
    assert modules | {"none", "auto"} == set(options("tracking"))
    for option in options("tracking"):
        assert compose_config([f"tracking={option}"]).tracking.backend == option


def test_a_tracker_that_is_none_is_told_the_options():
    with pytest.raises(UserError, match=rf"tracking\.backend=aim: choose one of {', '.join(options('tracking'))}"):
        compose_config(["tracking.backend=aim"])


def test_every_part_has_a_factor_on_its_rate():
    assert [key for key in schema_keys() if key.startswith("train.lr_factor.")] == [
        f"train.lr_factor.{part}" for part in PARTS
    ]


def test_the_description_of_a_key():
    assert describe_key("train.nothing") is None
    steps = describe_key("train.steps")
    assert (steps.type, steps.low, steps.default, steps.help) == ("int", 1, 100, "Optimizer steps.")
    assert steps.allowed() == "a whole number, at least 1"
    assert describe_key("train.clip").allowed() == "a number, at least 1e-12 (or null)"
    assert describe_key("train.dtype").allowed() == "one of float32, bfloat16"
    assert describe_key("tying.A.trained").help == "Whether the optimizer changes it."


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=many", "it takes a whole number, at least 1. Optimizer steps."),
        ("train.clip=much", r"it takes a number, at least 1e-12 \(or null\). Largest global gradient norm"),
        ("train.bucket=maybe", "it takes true or false"),
    ],
)
def test_a_value_of_a_wrong_type_is_told_what_the_key_takes(override, words):
    with pytest.raises(UserError, match=words):
        compose_config([override])


def test_a_value_at_its_bound_is_allowed():
    """Both ends of a range belong to it."""
    assert compose_config(["score.batch_size=65536"]).score.batch_size == 65_536
    with pytest.raises(UserError, match=r"score\.batch_size=65537: must be at most 65,536"):
        compose_config(["score.batch_size=65537"])
