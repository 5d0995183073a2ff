"""The rule of initial values, and specifications that do not fit the model."""

from dataclasses import replace

import pytest

from tiedlora.config.check_tying import check_tying
from tiedlora.errors import UserError
from tiedlora.tying import Architecture, Factor, Part, Tying


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"B": Factor(init=1.0)}, "no part starts at zero"),
        ({"v": Part(init=0.0)}, "B and v both start at zero"),
        ({"B": Factor(trained=False, init=0.0)}, "starts at zero and is frozen"),
        ({"A": Factor(init="gaussian")}, "tying.A.init=gaussian"),
        ({"u": Part(init=float("nan"))}, "tying.u.init=nan"),
        ({"A": Factor(init="uniform", share=0)}, "tying.A.share=0"),
        ({"A": Factor(init="uniform", share="some")}, "tying.A.share=some"),
        ({"targets": []}, "tying.targets"),
        ({"targets": ["qkv", "k"]}, "adapted twice"),
        ({"targets": ["query"]}, "'query' is not a projection"),
        ({"dropout": 1.0}, "tying.dropout"),
        ({"layers": []}, "tying.layers: is empty"),
        ({"layers": [0, 4]}, "tying.layers: holds 4, but the model has 4 layers: 0 to 3 are allowed"),
    ],
)
def test_specifications_that_cannot_train_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        check_tying(replace(Tying(), **change), Architecture(layers=4, hidden=1, heads=1, kv_heads=1, head_dim=1))
