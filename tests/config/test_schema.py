"""The schema is the only place that declares a key, and its choices are those that the code implements."""

from typing import get_args, get_type_hints

import pytest

from tiedlora.config.compose import compose_config
from tiedlora.config.explain import options, schema_keys
from tiedlora.config.project import PROJECT
from tiedlora.config.schema import TrainConfig
from tiedlora.errors import UserError
from tiedlora.keys import help_of
from tiedlora.training.optimizer import OPTIMIZERS, SCHEDULES
from tiedlora.tying import PARTS


@pytest.mark.parametrize("name", schema_keys())
def test_every_key_has_help(name):
    assert help_of(name, schema_keys())


def test_optimizers_and_schedules_are_the_schemas_choices():
    types = get_type_hints(TrainConfig)
    assert set(OPTIMIZERS) == set(get_args(types["optimizer"]))
    assert set(SCHEDULES) == set(get_args(types["schedule"]))


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


def test_the_help_of_a_key_is_the_docstring_below_it():
    assert help_of("train.steps", schema_keys()) == "Optimizer steps."
    # The field is inherited: from Part by Factor.
    assert help_of("tying.A.trained", schema_keys()) == "Whether the optimizer changes it."


def test_a_wrong_value_is_told_what_the_key_takes_and_what_it_means():
    says = r"^train\.dtype=half: must be 'float32' or 'bfloat16'\. Number type of the frozen base"
    with pytest.raises(UserError, match=says):
        compose_config(["train.dtype=half"])
