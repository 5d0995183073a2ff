"""Arms of other methods: they move, reload, and leave the base as it was; PEFT's LoRA and VeRA are ours."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.families import model_of_images
from helpers.tiny import composed, logits, tiny

from tiedlora import other_methods
from tiedlora.adapter import architectures
from tiedlora.adapter.arms import ArmSpec, groups_by_pattern
from tiedlora.adapter.attach import attach_saved, new_arm
from tiedlora.config.compose import command
from tiedlora.config.explain import options
from tiedlora.config.identity import run_id
from tiedlora.config.sizes import nearest_size, trainable_params
from tiedlora.errors import UserError
from tiedlora.models.base_model import load_base
from tiedlora.runs import loading, run
from tiedlora.runs.admission import measure
from tiedlora.runs.inputs import SingleSlotCache
from tiedlora.runs.loading import check_scores_mean_something
from tiedlora.tying import Layout, LrFactors

# Blocks of these sizes do not fit the tiny model, or it has too few layers. They are tried on a random model with the
# sizes of SmolLM2-135M.
TOO_LARGE = ("c3a", "c3a_l16", "road", "boft_l10", "delora_l17", "dora_kv24", "loha_l9", "randlora_l17", "vblora")
REAL_SIZES = ("model=smollm2_135m", "model.source=random", "model.name=random")
ARMS = []
for name in options("tying"):
    if name.removeprefix("peft/") in TOO_LARGE:
        ARMS.append(pytest.param(name, REAL_SIZES, marks=pytest.mark.slow))
    elif name.startswith("peft/"):
        ARMS.append(pytest.param(name, ("model=tiny_llama",)))
SMALLER = {"peft/miss": ("tying.arguments.r=8",)}
ROWS = [[(7 * i + j * j) % 200 for i in range(30)] for j in range(4)]


def spec_of(name: str, *words: str, seed: int = 0) -> ArmSpec:
    config = composed([f"tying={name}", "model=tiny_llama", *words])
    return ArmSpec(config.tying, config.model.architecture, seed)


def take_steps(arm, ids: torch.Tensor, count: int) -> None:
    groups = [{"params": group.parameters} for group in arm.parameter_groups(LrFactors())]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    for _ in range(count):
        arm.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("name", "model"), ARMS)
def test_an_arm_moves_reloads_and_leaves_the_base_as_it_was(name, model, ids, tmp_path):
    config = composed([f"tying={name}", *model, *SMALLER.get(name, ())])
    base = load_base(config.model, "float32", torch.device("cpu"), tmp_path)
    state, attributes = copy.deepcopy(base.model.state_dict()), set(vars(base.model))
    before = logits(base.model, ids)
    generator = torch.get_rng_state()
    arm = new_arm(base.model, ArmSpec(config.tying, config.model.architecture, 0))
    assert torch.equal(torch.get_rng_state(), generator)
    count = sum(parameter.numel() for parameter in arm.trained_parts().values())
    assert count == trainable_params(config)
    grouped = [parameter for group in arm.parameter_groups(LrFactors()) for parameter in group.parameters]
    assert sorted(map(id, grouped)) == sorted(map(id, arm.trained_parts().values()))
    take_steps(arm, ids, 3)
    after = logits(base.model, ids)
    assert not torch.equal(after, before)
    trained = [name for name, parameter in arm.trained_parts().items() if parameter.requires_grad]
    arm.disable()
    assert torch.equal(logits(base.model, ids), before)
    arm.enable()
    assert torch.equal(logits(base.model, ids), after)
    assert [name for name, parameter in arm.trained_parts().items() if parameter.requires_grad] == trained
    arm.save(tmp_path / "arm", base.record)
    arm.detach()
    loaded = attach_saved(base.model, tmp_path / "arm")
    assert torch.equal(logits(base.model, ids), after)
    loaded.detach()
    assert torch.equal(logits(base.model, ids), before)
    assert set(base.model.state_dict()) == set(state)
    assert all(torch.equal(value, state[key]) for key, value in base.model.state_dict().items())
    assert set(vars(base.model)) == attributes


@pytest.mark.parametrize(("start", "put_back"), [("pissa", True), ("olora", False)])
def test_an_arm_sees_that_peft_has_changed_the_base(start, put_back, monkeypatch):
    """As with an argument that other_methods.py does not know. PEFT changes the weights in place for olora."""
    monkeypatch.setattr(other_methods, "LORA_STARTS", (start,))
    base = tiny("tiny_llama")
    before = copy.deepcopy(base.model.state_dict())
    with pytest.raises(UserError, match="changes weights of the base; take other arguments"):
        new_arm(
            base.model, spec_of("peft", "tying.method=LoraConfig", f"tying.arguments={{init_lora_weights: {start}}}")
        )
    after = base.model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items()) == put_back


@pytest.mark.parametrize(
    "arguments",
    [
        "target_modules: [q_proj, lm_head]",
        "target_modules: [q_proj, embed_tokens]",
        "target_modules: [q_proj], trainable_token_indices: [1, 2]",
    ],
)
def test_an_arm_on_the_embedding_or_the_head_is_refused(arguments):
    """The losses read the head's weight, so they would leave such an arm out."""
    base = tiny("tiny_llama")
    names = set(base.model.state_dict())
    with pytest.raises(UserError, match=r"it adapts the embedding or the head|it trains weights of the base itself"):
        new_arm(base.model, spec_of("peft", "tying.method=LoraConfig", f"tying.arguments={{{arguments}}}"))
    assert set(base.model.state_dict()) == names


def test_peft_loads_the_folder_that_a_run_writes(ids, tmp_path):
    from peft import PeftModel

    base = tiny("tiny_llama")
    twin = copy.deepcopy(base.model)
    arm = new_arm(base.model, spec_of("peft/vera", "tying.arguments={r: 8}"))
    take_steps(arm, ids, 2)
    arm.save(tmp_path / "arm", base.record)
    theirs = PeftModel.from_pretrained(twin, tmp_path / "arm").eval()
    assert torch.equal(logits(theirs, ids), logits(base.model, ids))
    saved = json.loads((tmp_path / "arm" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == base.record.name
    assert saved["target_modules"] == sorted(saved["target_modules"])


def test_seeds_draw_other_values_and_the_same_seed_the_same_ones():
    base = tiny("tiny_llama")
    drawn = []
    for seed in (0, 1, 0):
        arm = new_arm(base.model, spec_of("peft/vera", seed=seed))
        drawn.append(torch.cat([buffer.flatten() for buffer in arm.buffers().values()]))
        arm.detach()
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_a_checkpoint_gets_the_buffers_that_have_changed():
    arm = new_arm(tiny("tiny_llama").model, spec_of("peft/vera"))
    assert arm.changed_buffers() == {}
    name, buffer = next(iter(arm.buffers().items()))
    buffer.add_(1.0)
    assert list(arm.changed_buffers()) == [name]


def test_an_arm_whose_rows_change_each_other_is_scored_singly():
    base = tiny("tiny_llama")
    assert "off the base" in measure(base.model, spec_of("peft/unilora"), base.record, ROWS, 1e-2).marks()
    admission = measure(base.model, spec_of("peft/lily"), base.record, ROWS, 1e-2)
    words = ["tying=peft/lily", "score.metrics=[exact_match_strict]"]
    with pytest.raises(UserError, match=r"score\.batch_size=1"):
        check_scores_mean_something(admission, composed(words))
    check_scores_mean_something(admission, composed([*words, "score.batch_size=1"]))


def test_patterns_give_rates_and_decay():
    parts = {name: torch.nn.Parameter(torch.zeros(1)) for name in ("layer.0.bank", "layer.0.logits", "layer.1.bank")}
    first, second = groups_by_pattern(parts, {"bank$": 10.0}, ["logits"])
    assert (len(first.parameters), first.lr_factor, first.decays) == (2, 10.0, True)
    assert (len(second.parameters), second.lr_factor, second.decays) == (1, 1.0, False)
    with pytest.raises(UserError, match=r"'u_l' matches no trained parameter; they are .*bank"):
        groups_by_pattern(parts, {"u_l": 2.0}, None)


def test_the_identity_has_all_arguments_and_not_the_budget():
    plain = composed(["tying=peft/vera", "tying.arguments.r=192", "model=smollm2_135m"])
    budget = composed(["tying=peft/vera", "budget=46080", "model=smollm2_135m"])
    assert run_id(plain) == run_id(budget)
    assert run_id(plain).startswith("peft_Vera-r8-")
    assert plain.tying.resolved["d_initial"] == 0.1
    assert "projection_prng_key" not in plain.tying.resolved
    other = composed(["tying=peft/vera", "tying.arguments.r=192", "model=smollm2_135m"])
    other.tying.resolved["d_initial"] = 0.2
    assert run_id(other) != run_id(plain)
    assert run_id(composed(["tying=peft/vera", "tying.arguments.r=192", "model=smollm2_135m", "rank=r2"])) == (
        run_id(plain)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["tying=peft/vera", "tying.resolved={r: 3}"],
            "tying.resolved: Cannot set value of read-only .* The program fills them in",
        ),
        (["tying=peft/lora_kv", "model=tiny_gpt2"], r"tying.targets: 'k' is a part of attn.c_attn, .*\[qkv\]"),
        # A start that needs another base, or data.
        (["tying=peft/lora", "tying.arguments={init_lora_weights: eva}"], r"init_lora_weights=eva: .*of true, false"),
        # Its generator's state is in no checkpoint.
        (
            ["tying=peft", "tying.method=Pvera", "tying.arguments={generator_seed: 7}"],
            "no checkpoint has",
        ),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        trainable_params(composed(["model=tiny_llama", *words]))
    assert "\n" not in str(caught.value)


def test_of_a_model_that_also_reads_images_the_layers_of_text_are_adapted():
    sites = {"qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
    model = model_of_images()
    architecture = architectures.read(model, Layout("model.language_model.layers", sites))
    for words, layers in (([], "012"), (["tying.layers=[evenly 2]"], "02")):
        spec = replace(spec_of("peft/lora", *words), architecture=architecture)
        arm = new_arm(model, spec)
        adapted = {re.search(r"language_model\.layers\.(\d)\.", name)[1] for name in arm.trained_parts()}
        assert adapted == {*layers}
        count = sum(parameter.numel() for parameter in arm.trained_parts().values())
        own = composed(["tying=peft/lora", "model=tiny_llama", *words])
        assert count == trainable_params(replace(own, model=replace(own.model, architecture=architecture)))
        arm.detach()
    own = replace(spec_of("peft/lora", "tying.arguments.target_modules=[q_proj]").tying, layers=None)
    assert other_methods.peft_config(own, architecture, 0).target_modules == {"q_proj"}, "what the user has named"


def test_an_arm_leaves_other_files_of_a_folder_and_others_may_read_its_own(tmp_path):
    folder = tmp_path / "arm"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    arm = new_arm(tiny("tiny_llama").model, spec_of("peft/lora"))
    for _ in range(2):
        arm.save(folder, tiny("tiny_llama").record)
    arm.detach()
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "adapter_model.safetensors").stat().st_mode == (folder / "notes.txt").stat().st_mode


def test_layers_may_be_spread_evenly_before_a_budget_is_reached():
    named, numbers = (
        composed(["tying=peft/lora", f"tying.layers={layers}", "model=smollm2_135m", "budget=100000"]).tying.resolved
        for layers in ("[evenly 15]", "[0-14]")
    )
    assert named["r"] == numbers["r"]


def test_a_size_that_depends_on_biases_is_known_with_the_model():
    words = ["tying=peft", "tying.method=GloraConfig", "model=tiny_llama"]
    assert trainable_params(composed(words)) is None


def test_the_search_for_a_size_finds_the_nearest():
    assert nearest_size(lambda value: 90 * value, 46_080, 10**6) == 512
    assert nearest_size(lambda value: 46_080 if value >= 100 else 10 * value, 46_080, 10**6) >= 100
    assert nearest_size(lambda value: value * value if value % 2 == 0 else None, 101, 10**6) == 10
    falling = nearest_size(lambda value: 1000 // value + value, 63, 10**6, landmarks=(32,))
    assert abs(1000 // falling + falling - 63) <= 3


def test_a_damaged_folder_is_refused(tmp_path):
    base = tiny("tiny_llama")
    arm = new_arm(base.model, spec_of("peft/lora"))
    arm.save(tmp_path / "arm", base.record)
    arm.detach()
    file: Path = tmp_path / "arm" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="is damaged or was changed"):
        attach_saved(base.model, tmp_path / "arm")
    assert not [module for module in base.model.modules() if type(module).__module__.startswith("peft")]


@pytest.mark.parametrize("words", ["tying.arguments={r: 4}", "tying.arguments.r=4", "++tying.arguments.r=4"])
def test_arguments_are_set_on_the_command_line(words):
    hra = ("tying=peft", "tying.method=HRAConfig")
    plain, factors = composed([*hra, words]), composed([*hra, words, "tying.lr_factors={hra_u: 2.0}"])
    assert plain.tying.resolved["r"] == 4
    assert run_id(factors) != run_id(plain)
    assert "not exact" not in command(composed([*hra, words, "tying.lr_factors={hra_.*: 2.0}"]))
    with pytest.raises(UserError, match="'hra' and 'u' give hra_u different factors"):
        groups_by_pattern({"hra_u": torch.nn.Parameter(torch.ones(1))}, {"hra": 2.0, "u": 1.0}, None)
    nulls = ("tying.arguments=null", "tying.lr_factors=null")
    assert run_id(composed([*hra, *nulls])) == run_id(composed(hra))
    assert run_id(composed(nulls)) == run_id(composed([]))


def test_a_run_that_fails_leaves_no_base_for_the_next(tiny_config, finish, monkeypatch):
    alone = finish(tiny_config("tying=TAB"))
    monkeypatch.setattr(loading, "_BASE", SingleSlotCache())
    with monkeypatch.context() as patch:
        patch.setattr(loading, "trainable_params", lambda _: 1)
        with pytest.raises(AssertionError, match="expected 1"):
            run.main(tiny_config("tying=TABuv"))
    again = run.main(tiny_config("tying=TAB", "force=true"))
    assert again.files == alone.files
