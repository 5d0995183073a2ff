"""Full fine-tuning as an arm: float32 weights, the base that comes back, the head's gradient, and what is refused."""

import copy

import pytest
import torch
from helpers.families import family_model
from helpers.tiny import TINY, composed, logits, tiny
from torch.nn import functional as F

import tiedlora
from tiedlora.adapter import arms, files
from tiedlora.adapter.arms import ArmSpec
from tiedlora.adapter.attach import attach_saved, new_arm
from tiedlora.adapter.full_arm import FullArm
from tiedlora.config.check import check
from tiedlora.config.identity import arm_of
from tiedlora.data.batching import collate
from tiedlora.data.encoding import Encoded
from tiedlora.errors import UserError
from tiedlora.page import figures
from tiedlora.training.loss import row_divergences, target_loss
from tiedlora.tying import LrFactors

ROWS = [Encoded((5, 6, 7), (40, 41, 42, 256)), Encoded((9,), (50, 51, 256)), Encoded((1, 2), (60, 256))]
DTYPES = ("float32", "bfloat16")


def full_on(base, name: str = "tiny_llama", seed: int = 0) -> FullArm:
    config = composed(["tying=full", f"model={name}"])
    return new_arm(base.model, ArmSpec(config.tying, config.model.architecture, seed))


def take_steps(arm: FullArm, count: int = 2, lr: float = 1e-2) -> None:
    groups = [{"params": group.parameters} for group in arm.parameter_groups(LrFactors())]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    for _ in range(count):
        target_loss(arm.model, collate(ROWS, pad_id=256)).backward()
        optimizer.step()
        optimizer.zero_grad()


def plain_loss(model: torch.nn.Module, batch) -> torch.Tensor:
    """The sum of the cross-entropy over the targets, computed by transformers' model and torch alone."""
    total = torch.zeros((), dtype=torch.float32)
    for row in batch.rows:
        ids = torch.tensor([[*row.prompt, *row.target]])
        of_targets = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].float()
        total = total + F.cross_entropy(of_targets, torch.tensor(row.target), reduction="sum")
    return total


@pytest.mark.parametrize("name", TINY)
def test_the_gradient_of_every_weight_is_that_of_plain_torch(name):
    """Also that of the head and of the embeddings, one tensor in tiny_gpt2, and summed over microbatches."""
    plain = copy.deepcopy(tiny(name).model).requires_grad_(True)
    batch = collate(ROWS, pad_id=256)
    plain_loss(plain, batch).backward()
    arm = full_on(tiny(name), name)
    for rows in (ROWS[:1], ROWS[1:]):
        target_loss(arm.model, collate(rows, pad_id=256)).backward()
    expected = dict(plain.named_parameters())
    assert set(arm.trained_parts()) == set(expected)
    for key, master in arm.trained_parts().items():
        assert (master.grad - expected[key].grad).abs().max() <= 1e-5 * expected[key].grad.abs().max() + 1e-7, key
    # What the model itself keeps would be memory without use.
    assert all(own.grad is None for own in arm.model.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY)
def test_it_moves_reloads_and_leaves_the_base_as_it_was(name, dtype, ids, tmp_path):
    base = tiny(name, dtype)
    state, attributes = copy.deepcopy(base.model.state_dict()), set(vars(base.model))
    before = logits(base.model, ids)
    arm = full_on(base, name)
    assert torch.equal(logits(base.model, ids), before)
    take_steps(arm)
    # The last step's values, which no pass has used yet.
    with arm.folded_once():
        after = logits(base.model, ids)
    assert not torch.equal(after, before)
    assert torch.equal(logits(base.model, ids), after)
    arm.disable()
    assert torch.equal(logits(base.model, ids), before)
    arm.enable()
    assert torch.equal(logits(base.model, ids), after)
    arm.save(tmp_path / "arm", base.record)
    # Also twice, and while it computes as the base.
    arm.disable()
    with arm.folded_once():
        assert torch.equal(logits(base.model, ids), before)
    arm.detach()
    loaded = attach_saved(base.model, tmp_path / "arm", base.record)
    assert torch.equal(logits(base.model, ids), after)
    loaded.detach()
    assert torch.equal(logits(base.model, ids), before)
    assert all(torch.equal(value, state[key]) for key, value in base.model.state_dict().items())
    assert set(base.model.state_dict()) == set(state)
    assert set(vars(base.model)) == attributes
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_steps_below_bfloat16s_precision_are_not_lost(ids):
    """Steps of 2^-14 beside weights near 1, where bfloat16 has steps of 2^-7: the float32 weights sum them up."""
    base = tiny("tiny_llama", "bfloat16")
    arm = full_on(base)
    norm = arm.named_parameters()["model.norm.weight"]
    start = norm.detach().clone()
    assert torch.equal(start.bfloat16(), torch.ones_like(start, dtype=torch.bfloat16))
    take_steps(arm, count=10, lr=2**-14)
    moved = (norm - start).abs()
    assert 0 < moved.max() < 2**-9
    # The model computes with the rounded ones.
    logits(arm.model, ids)
    assert {str(parameter.dtype) for parameter in arm.model.parameters()} == {"torch.bfloat16"}
    for name, own in arm.model.named_parameters():
        assert torch.equal(own, arm.named_parameters()[name].bfloat16())


def test_bfloat16_hides_no_update_on_average():
    """Each weight moves by a tenth of a step of bfloat16. Then a tenth of them moves by one."""
    base = tiny("tiny_llama", "bfloat16")
    before = copy.deepcopy(base.model.state_dict())["lm_head.weight"].float()
    arm = full_on(base)
    master = arm.named_parameters()["lm_head.weight"]
    assert torch.equal(master.bfloat16().float(), before)
    assert not torch.equal(master, before)
    step = 2.0 ** (torch.frexp(before).exponent - 8)
    with torch.no_grad():
        master += 0.1 * step
    moved = (master.bfloat16().float() - before) / step
    # 8,320 weights, so the mean's standard error is 0.003.
    assert float(moved.detach().mean()) == pytest.approx(0.1, abs=0.015)
    # Another seed draws other values, and the same seed the same.
    arm.detach()
    values = []
    for seed in (0, 0, 1):
        arm = full_on(base, seed=seed)
        values.append(arm.named_parameters()["lm_head.weight"])
        arm.detach()
    first, again, other = values
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", TINY)
def test_the_drift_compares_each_model_with_its_own_head(name):
    base = tiny(name)
    original = copy.deepcopy(base.model)
    arm = full_on(base, name)
    take_steps(arm)
    batch = collate(ROWS, pad_id=256)

    class AsBase:
        def __enter__(self):
            arm.disable()

        def __exit__(self, *_):
            arm.enable()

    found = row_divergences(arm.model, batch, AsBase)
    expected = []
    for row in batch.rows:
        ids = torch.tensor([[*row.prompt, *row.target]])
        places = slice(len(row.prompt) - 1, -1)
        log_p, log_q = (F.log_softmax(logits(model, ids)[0, places], -1) for model in (arm.model, original))
        expected.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tying.layers=[0,1]"], r"tying\.layers=\[0, 1\]: full fine-tuning trains every weight"),
        (["tying.targets=[q]"], r"tying\.targets=.*every weight"),
        (["tying.dropout=0.1"], r"tying\.dropout=0\.1: full fine-tuning"),
        (["+tying.arguments={r: 4}"], r"tying\.arguments: full fine-tuning has none"),
        (["model.quantization=nf4"], r"tying\.method=full: needs the whole model, unquantised and on one device"),
        (["train.shard=true"], r"tying\.method=full: needs the whole model"),
        (["train.lr_factor.A=2"], r"train\.lr_factor\.A=2: full has no part A"),
    ],
)
def test_what_has_no_meaning_is_refused(words, message):
    with pytest.raises(UserError, match=message) as refused:
        check(composed(["model=tiny_llama", "tying=full", *words]))
    assert "\n" not in str(refused.value)


def test_a_model_without_biases_and_weights_of_norms_decays_all_weights():
    model, spec = family_model("olmo"), composed(["tying=full", "model=tiny_llama"]).tying
    arm = new_arm(model, ArmSpec(spec, composed(["model=tiny_llama"]).model.architecture, 0))
    assert [group.decays for group in arm.parameter_groups(LrFactors())] == [True]
    arm.detach()


def test_a_quantised_model_is_refused():
    base = tiny("tiny_llama")
    head = base.model.lm_head
    head.weight = torch.nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"lm_head\.weight is quantised or offloaded"):
        full_on(base)


def test_interfaces_of_adapters_say_that_it_is_none(tmp_path):
    arm = full_on(base := tiny("tiny_llama"))
    arm.save(tmp_path / "arm", base.record)
    arm.detach()
    with pytest.raises(UserError, match="tying=full: is not one of") as refused:
        tiedlora.attach(base.model, "full")
    with pytest.raises(UserError, match="tying=full: is not one of"):
        tiedlora.TiedLoraConfig(tying="full")
    # A TiedAdapter is what AdapterSet takes, and what train.init_from reads.
    with pytest.raises(UserError, match=r"adapter\.json: describes an arm of another method") as unread:
        files.load(tmp_path / "arm")
    assert "\n" not in str(refused.value) + str(unread.value)
    with pytest.raises(UserError, match="'full' is taken"):
        arms.register("full", FullArm)


def test_it_is_an_arm_of_its_own_and_no_lora():
    full = arm_of(composed(["model=tiny_llama", "tying=full"]))
    assert (full.label, full.word, full.option, full.short) == ("full", "full", "full", "full")
    assert not full.is_size_of("LoRA")
    assert figures.style(full) not in [look for name, look in figures.STYLES.items() if name != "full"]
    assert figures.style(full) not in figures.OTHERS
