"""The specification: its rule of initial values, its names, parameter counts, and what is refused."""

from dataclasses import replace

import pytest
from helpers.tiny import EIGHT, model_option, tying_option

from tiedlora import tying
from tiedlora.adapter.parts import check_specification
from tiedlora.config.compose import compose_config
from tiedlora.config.identity import arm_of, identity
from tiedlora.errors import UserError
from tiedlora.tying import Architecture, Factor, Part, Tying

# From the paper's formulas of trainable parameters with L = 32, d_in = 4096, d_out = 3 x 4096 and r = 8: for example
# TABuv = r (d_in + d_out) + L (r + d_out).
# Then the initial values of A, B, u and v: one trained part starts at zero (docs/method.md).
METHODS = {
    "LoRA": (4_194_304, ("uniform", 0.0, 1.0, 1.0)),
    "TA": (32_768, (0.0, "uniform", 1.0, 1.0)),
    "TB": (98_304, ("uniform", 0.0, 1.0, 1.0)),
    "TAB": (131_072, ("uniform", 0.0, 1.0, 1.0)),
    "Tuv": (393_472, ("uniform", "uniform", 1.0, 0.0)),
    "TAuv": (426_240, ("uniform", "uniform", 1.0, 0.0)),
    "TBuv": (491_776, ("uniform", "uniform", 1.0, 0.0)),
    "TABuv": (524_544, ("uniform", "uniform", 1.0, 0.0)),
}


@pytest.mark.parametrize("name", EIGHT)
def test_counts_and_initial_values_are_the_methods(name):
    spec, (count, inits) = tying_option(name), METHODS[name]
    assert tying.trainable_params(spec, 8, model_option("llama2_7b").architecture) == count
    assert tuple(getattr(spec, part).init for part in tying.PARTS) == inits
    assert tying.name_of(spec) == spec.name == name


def test_v_starts_at_zero_if_it_is_trained_and_otherwise_b_or_a_alone():
    """The rule of the start, and the two earlier starts that it replaced. What is not specified is TABuv's."""
    for name in EIGHT:
        spec = tying.named(name)
        zero = "v" if spec.v.trained else "B" if spec.B.trained else "A"
        assert [part for part in tying.PARTS if getattr(spec, part).init == 0.0] == [zero], name
        if name in ("TABuv", "TBuv"):
            earlier = replace(tying.named(f"{name}_b0"), name=name, suggested_lr=spec.suggested_lr)
            assert earlier == replace(spec, B=replace(spec.B, init=0.0), v=replace(spec.v, init=1.0))
    assert tying.name_of(Tying()) == "TABuv"


def test_an_earlier_name_is_answered_with_the_new_one():
    for ask in (lambda: tying.named("TABuv_v0"), lambda: compose_config(["tying=TABuv_v0"])):
        with pytest.raises(UserError, match=r"^tying=TABuv_v0: TABuv_v0 is TABuv now, and the start .* is TABuv_b0$"):
            ask()


def test_layers_are_numbers_and_ranges():
    assert Tying(layers=[7, "2-4", 3, "0"]).layers == [0, 2, 3, 4, 7]
    for wrong in ("a", "4-2", "-1", "2-", "0-99999", 1.5, True, None, [1]):
        with pytest.raises(UserError, match=r"tying\.layers: .* is neither a layer's number nor a range"):
            Tying(layers=[wrong])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"v": Part(init=1.0)}, "no part starts at zero"),
        ({"B": Factor(init=0.0)}, "B and v both start at zero"),
        ({"v": Part(trained=False, init=0.0)}, "starts at zero and is frozen"),
        ({"A": Factor(init="gaussian")}, "tying.A.init=gaussian"),
        ({"u": Part(init=float("nan"))}, "tying.u.init=nan"),
        ({"A": Factor(init="uniform", share=0)}, "tying.A.share=0"),
        ({"A": Factor(init="uniform", share="some")}, "tying.A.share=some"),
        ({"targets": []}, "tying.targets"),
        ({"targets": ["qkv", "k"]}, "adapted twice"),
        ({"targets": ["query"]}, "'query' is not a projection"),
        ({"dropout": 1.0}, "tying.dropout"),
        ({"layers": []}, "tying.layers: is empty"),
        ({"layers": ["evenly 5"]}, r"tying.layers=\[evenly 5\]: the model has only 4 layers"),
        ({"layers": [0, 4]}, "tying.layers: holds 4, but the model has 4 layers: 0 to 3 are allowed"),
    ],
)
def test_specifications_that_cannot_train_are_refused(change, says):
    architecture = Architecture(layers=4, hidden=1, heads=1, kv_heads=1, head_dim=1)
    with pytest.raises(UserError, match=says):
        check_specification(replace(Tying(), **change), 1, 1.0, architecture, seed=0, scaling="standard")


class TestEvenlySpacedLayers:
    def test_they_are_the_middles_of_equal_parts(self):
        assert tying.evenly_spaced(15, 30) == list(range(1, 30, 2))
        assert tying.evenly_spaced(4, 30) == [3, 11, 18, 26]
        assert tying.evenly_spaced(1, 7) == [3]

    @pytest.mark.parametrize("count", [2, 7, 15])
    def test_an_option_is_lora_on_them_with_a_name_and_numbers_in_its_identity(self, count):
        config = compose_config([f"tying=LoRA_l{count}", "rank=r1"])
        assert identity(config)["tying"]["layers"] == tying.evenly_spaced(count, 30)
        assert (arm_of(config).label, arm_of(config).short) == (f"LoRA_l{count}", f"LoRA r 1, {count} layers")
        assert tying.named(f"LoRA_l{count}").suggested_lr == config.tying.suggested_lr
        assert tying.trainable_params(config.tying, 1, config.model.architecture) == 1536 * count

    def test_a_budget_below_rank_one_leaves_out_layers(self):
        config = compose_config(["tying=LoRA", "budget=23000"])
        assert (config.rank.r, config.tying.layers) == (1, tying.evenly_spaced(15, 30))
        assert compose_config(["tying=LoRA", "budget=46000"]).tying.layers is None
