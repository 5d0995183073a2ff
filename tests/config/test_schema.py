"""The schema is the only place that declares a key, and its choices are those that the code implements."""

import pytest

from tiedlora.config.compose import compose_config
from tiedlora.config.explain import allowed, options, schema_keys
from tiedlora.config.project import PROJECT
from tiedlora.errors import UserError
from tiedlora.training.optimizer import OPTIMIZERS, SCHEDULES
from tiedlora.tying import PARTS


@pytest.mark.parametrize("name", schema_keys())
def test_every_key_has_help(name):
    assert schema_keys()[name].help


def test_optimizers_and_schedules_are_the_schemas_choices():
    assert set(OPTIMIZERS) == set(schema_keys()["train.optimizer"].rules.choices)
    assert set(SCHEDULES) == set(schema_keys()["train.schedule"].rules.choices)


def test_a_tracker_is_one_file_and_one_option():
    """Each option of conf/tracking but `none` and `auto` is a module with a TRACKER, and the other way round."""
    folder = PROJECT / "src" / "tiedlora" / "tracking"
    modules = {path.stem for path in folder.glob("*.py") if "\nTRACKER = " in path.read_text(encoding="utf-8")}
    assert modules | {"none", "auto"} == set(options("tracking"))
    for option in options("tracking"):
        assert compose_config([f"tracking={option}"]).tracking.backend == option


def test_every_part_has_a_factor_on_its_rate():
    assert [key for key in schema_keys() if key.startswith("train.lr_factor.")] == [
        f"train.lr_factor.{part}" for part in PARTS
    ]


def test_the_description_of_a_key():
    keys = schema_keys()
    assert keys["train.steps"].help == "Optimizer steps."
    assert allowed(keys["train.steps"]) == "a whole number, at least 1"
    assert allowed(keys["train.clip"]) == "a number, at least 1e-12 (or null)"
    assert allowed(keys["train.dtype"]) == "one of float32, bfloat16"
    assert keys["tying.A.trained"].help == "Whether the optimizer changes it."


def test_a_value_of_a_wrong_type_is_told_what_the_key_takes():
    with pytest.raises(UserError, match=r"it takes a whole number, at least 1\. Optimizer steps\."):
        compose_config(["train.steps=many"])


def test_a_value_at_its_bound_is_allowed():
    """Both ends of a range belong to it."""
    assert compose_config(["score.batch_size=65536"]).score.batch_size == 65_536
