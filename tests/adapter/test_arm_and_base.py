"""An arm changes nothing of the base model, and files beside an adapter stay."""

import copy
import json

import pytest
import torch
from helpers.tiny import tiny, tying_option

from tiedlora.adapter import attach
from tiedlora.adapter.arms import ArmSpec, new_arm
from tiedlora.config import methods
from tiedlora.config.compose import compose_config
from tiedlora.config.sizes import trainable_params
from tiedlora.errors import UserError
from tiedlora.runs import library, run, trainer
from tiedlora.runs.inputs import SingleSlotCache

LORA = ("tying=peft", "tying.method=LoraConfig", "model=tiny_llama")


def spec_of(*words: str) -> ArmSpec:
    config = compose_config([*LORA, *words])
    return ArmSpec(config.tying, config.model.architecture, 0)


@pytest.mark.parametrize("start", ["pissa_niter_4", "eva"])
def test_a_start_that_needs_another_base_or_data_is_refused(start):
    with pytest.raises(UserError, match=rf"tying\.arguments\.init_lora_weights={start}: .*choose one of true, false"):
        spec_of(f"tying.arguments={{init_lora_weights: {start}}}")


@pytest.mark.parametrize("start", ["true", "gaussian"])
def test_other_starts_leave_the_base_as_it_is(start):
    base = tiny("tiny_llama")
    before = copy.deepcopy(base.model.state_dict())
    new_arm(base.model, spec_of(f"tying.arguments={{init_lora_weights: {start}}}")).detach()
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


@pytest.mark.parametrize(("start", "put_back"), [("pissa", True), ("olora", False)])
def test_an_arm_sees_that_peft_has_changed_the_base(start, put_back, monkeypatch):
    """As with an argument that methods.py does not know. PEFT changes the weights in place for olora."""
    monkeypatch.setattr(methods, "LORA_STARTS", (start,))
    base = tiny("tiny_llama")
    before = copy.deepcopy(base.model.state_dict())
    with pytest.raises(UserError, match="changes weights of the base, which no arm may do"):
        new_arm(base.model, spec_of(f"tying.arguments={{init_lora_weights: {start}}}"))
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
        new_arm(base.model, spec_of(f"tying.arguments={{{arguments}}}"))
    assert set(base.model.state_dict()) == names


def test_named_modules_of_shira_are_counted_once_attached():
    words = (
        "tying=peft",
        "tying.method=ShiraConfig",
        "tying.arguments={target_modules: [q_proj], r: 2}",
        "model=tiny_llama",
    )
    config = compose_config(list(words))
    assert trainable_params(config) is None
    arm = new_arm(tiny("tiny_llama").model, ArmSpec(config.tying, config.model.architecture, 0))
    assert sum(part.numel() for part in arm.trained_parts().values()) > 0


def test_a_run_that_fails_leaves_no_base_for_the_next(tiny_config, finish, monkeypatch):
    """A cell of a sweep shares its base with the next one, unless it failed."""
    alone = finish(tiny_config("tying=TAB"))
    monkeypatch.setattr(trainer, "_BASE", SingleSlotCache())
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "trainable_params", lambda _: 1)
        with pytest.raises(AssertionError, match="expected 1"):
            run.main(tiny_config("tying=TABuv"))
    again = run.main(tiny_config("tying=TAB", "force=true"))
    assert again.files == alone.files


def test_the_part_that_starts_at_zero_must_learn(tiny_config):
    for tying, part in (("TABuv", "B"), ("Tuv", "v"), ("LoRA", "B")):
        with pytest.raises(UserError, match=rf"train\.lr_factor\.{part}=0: {part} starts at zero"):
            run.main(tiny_config(f"tying={tying}", f"train.lr_factor.{part}=0"))
    compose_config(["tying=TABuv", "train.lr_factor.A=0"])


def test_saving_keeps_the_other_files_of_a_folder(tmp_path):
    base = tiny("tiny_llama")
    attached = attach(base.model, tying_option("TABuv"), 4)
    (tmp_path / "data").mkdir()
    (tmp_path / "thesis.tex").write_text("mine")
    for _ in range(2):
        size = attached.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            *("data", "thesis.tex", "adapter.json", "adapter.safetensors")
        }
    assert size == sum((tmp_path / name).stat().st_size for name in ("adapter.json", "adapter.safetensors"))
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    attached.detach()
    again = library.load(tmp_path, base.model)
    assert json.loads((tmp_path / "adapter.json").read_text())["rank"] == 4
    again.detach()


def test_a_base_of_another_content_is_refused(tiny_config, tmp_path, script, monkeypatch):
    """By the notebook's `load`, and by generate.py."""
    base = tiny("tiny_llama")
    for part in (base.model, base.tokenizer):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    config = tiny_config("model.source=hub", "model.path=model")
    assert config.model.path == str(tmp_path / "model")
    run.main(config)
    (folder,) = (tmp_path / "outputs").glob("TABuv*")
    monkeypatch.chdir("/")
    code, out, err = script("scripts/generate.py", folder, "--prompt", "1 + 1")
    assert code == 0, err
    with torch.no_grad():
        next(base.model.parameters()).add_(1.0)
    base.model.save_pretrained(tmp_path / "model")
    code, out, err = script("scripts/generate.py", folder, "--prompt", "1 + 1")
    assert (code, out) == (2, "")
    assert "was trained on" in err
    (tmp_path / "model").rename(tmp_path / "moved")
    code, out, _ = script("scripts/verify.py", folder, "--rows", "0")
    assert code == 0, out
    assert "is not here" in out
