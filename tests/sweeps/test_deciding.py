"""A deciding sweep on a tiny model: the plan comes first, and a claim that is decided takes no further run."""

import json
import re
import shutil

import pytest
from helpers.hostile import put_in_scores
from helpers.sweeping import Here, compose_sweep, times

from tiedlora.errors import UserError
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_finished
from tiedlora.records.selection import read_selection
from tiedlora.sweeps import staged, status
from tiedlora.sweeps.expand import DecidingOptions
from tiedlora.sweeps.staged import run_deciding

WORDS = (
    "tying=LoRA,TABuv_b0",
    "train.lr=1e-3,1e-1",
    "train.steps=8",
    "train.validate_every=2",
    "score.metrics=[target_loss]",
)
CLAIMS = """
paper: a test
looks: [2, 5]
claims:
  - name: the method has a lower loss
    method: {configuration: METHOD, rank: 8}
    comparator: {configuration: COMPARATOR, rank: 8}
    tasks: {chain_sum: target_loss}
"""


def decide(sweep, claims: str, launcher: Here, budget: int | None = None, **options) -> None:
    rates = {
        "rungs": [0.5],
        "finalists": 2,
        "race_level": 0.3,
        "race_within": 0.005,
        "lowest_rate": 1e-3,
        "highest_rate": 0.1,
        **options,
    }
    run_deciding(sweep, DecidingOptions(claims=claims, budget=budget, **rates), launcher)


def seeds(launcher: Here) -> set[int]:
    return {cell.config.seed for cell in launcher.cells}


@pytest.fixture
def swept(tiny_run):
    return compose_sweep(tiny_run(*WORDS))


def claims_file(tmp_path, margin: float, rule: str = "better_by", sides=("LoRA", "TABuv_b0")) -> str:
    path, (method, comparator) = tmp_path / "claims.yaml", sides
    text = CLAIMS.replace("METHOD", method).replace("COMPARATOR", comparator)
    path.write_text(text + f"    {rule}: {margin:.9f}\n")
    return str(path)


def verdicts(sweep):
    return json.loads((sweep.path / "verdicts.json").read_text())


def test_a_decided_claim_takes_no_further_run_and_an_open_one_goes_on(swept, tmp_path, capsys):
    far = claims_file(tmp_path, 0.9)

    def planned():
        assert (swept.path / "plan.json").exists(), "the plan is written before the first run"

    launcher = Here(planned)
    decide(swept, far, launcher)
    (verdict,) = verdicts(swept)
    # The losses differ by less than 0.9 nats in every seed, so the first look contradicts the claim.
    assert (verdict["verdict"], verdict["look"], verdict["open"]) == ("contradicted", 1, False)
    assert seeds(launcher) == {0, 1}
    assert "contradicted: look 1 of 2" in capsys.readouterr().out
    assert status.read_search(swept.path, swept.cells).is_over
    (swept.path / "verdicts.json").unlink()
    assert not status.read_search(swept.path, swept.cells).is_over, "before the verdicts, looks may need more"
    decide(swept, far, Here())
    again, outputs = Here(), swept.path.parents[1]
    before = times(outputs)
    decide(swept, far, again)
    assert again.goals == []
    assert times(outputs) == before, "it is printed from a read-only archive too"


def test_rates_that_race_have_seeds_of_their_own_and_the_plan_names_them(swept, tmp_path):
    launcher, claims = Here(), claims_file(tmp_path, 0.9)
    decide(swept, claims, launcher, search_seeds=[20, 21, 22])
    assert json.loads((swept.path / "plan.json").read_text())["search_seeds"] == [20, 21, 22]
    assert seeds(launcher) >= {0, 1, 20, 21}
    scored = {cell.config.seed for cell in launcher.cells if list(cell.folder.path.glob("scores/*"))}
    assert scored == {0, 1}, "the looks' seeds alone are scored"
    (verdict,) = verdicts(swept)
    assert (verdict["verdict"], verdict["look"]) == ("contradicted", 1)
    with pytest.raises(UserError, match="with other values of search_seeds"):
        decide(swept, claims, Here(), search_seeds=[20, 21])


def test_other_claims_than_the_planned_ones_are_refused(swept, tmp_path):
    decide(swept, claims_file(tmp_path, 0.9), Here())
    with pytest.raises(
        UserError, match=r"plan\.json: was written before the first run with other values of claims_sha256"
    ):
        decide(swept, claims_file(tmp_path, 0.8), Here())
    with pytest.raises(UserError, match="other values of budget"):
        decide(swept, claims_file(tmp_path, 0.9), Here(), 30)


def test_a_sweep_that_has_run_nothing_is_bound_to_no_plan(swept, tmp_path, monkeypatch):
    claims = claims_file(tmp_path, 0.9)

    def refuse(_cells):
        raise UserError("no test rows")

    with monkeypatch.context() as patched:
        patched.setattr(staged, "check_scoring", refuse)
        with pytest.raises(UserError, match="no test rows"):
            decide(swept, claims, Here(), 5)
    assert not swept.path.exists()
    # Stopped before the first run, and then at one of the search, whose seeds are not those of the grid.
    for stop_before, budget in ((0, 5), (1, 30)):
        with pytest.raises(KeyboardInterrupt):
            decide(swept, claims, Here(stop_before=stop_before), budget, search_seeds=[20, 21])
        assert json.loads((swept.path / "plan.json").read_text())["budget"] == budget
    with pytest.raises(UserError, match="other values of budget"):
        decide(swept, claims, Here(), 29, search_seeds=[20, 21])


def test_an_open_claim_takes_the_seeds_of_its_next_looks_within_the_budget(swept, tmp_path, capsys):
    decide(swept, claims_file(tmp_path, 0.9), Here())
    runs = len(list(swept.path.parents[1].glob("*/result.json")))
    losses = {}
    for choice in read_selection(swept.path / "selection.json").choices:
        for run_id in choice.run_ids:
            done = read_finished(RunFolder(swept.path.parents[1] / run_id))
            losses[choice.configuration, done.record.seed] = done.scores.metrics("validation")["target_loss"].value
    # Half of the first seeds' mean difference as the margin: two seeds are too few to decide, and later looks may.
    differences = [losses["TABuv_b0", seed] - losses["LoRA", seed] for seed in (0, 1)]
    margin = sum(differences) / 4
    sides = ("LoRA", "TABuv_b0") if margin > 0 else ("TABuv_b0", "LoRA")
    open_claim = claims_file(tmp_path, abs(margin), sides=sides)
    (swept.path / "plan.json").unlink()
    limited = Here()
    decide(swept, open_claim, limited, runs + 1)
    assert limited.goals == []
    assert f"the budget of {runs + 1} runs is spent" in capsys.readouterr().out
    (swept.path / "plan.json").unlink()
    file = next(swept.path.parents[1].glob("TABuv_b0-*-s0-*/scores/validation.losses.jsonl"))
    tested = file.with_name("test.losses.jsonl")  # As after `scripts/score.py RUN --split test`.
    shutil.copy(file, tested)
    put_in_scores(tested, "split", "test")
    further = Here()
    decide(swept, open_claim, further)
    (verdict,) = verdicts(swept)
    assert not verdict["open"]
    assert verdict["look"] > 1
    assert seeds(further) == set(range(2, verdict["seeds"]))
    assert {(cell.config.tying.name, cell.config.seed) for cell in further.cells} == {
        (name, seed) for name in ("LoRA", "TABuv_b0") for seed in seeds(further)
    }
    # A start that finds all runs there has spent as much of its budget.
    (all_runs,) = re.findall(r"(\d+) runs in all", capsys.readouterr().out.rsplit("verdict", 1)[-1])[-1:]
    (swept.path / "plan.json").unlink()
    again = Here()
    decide(swept, open_claim, again, int(all_runs))
    assert again.goals == []
    assert f"{all_runs} runs in all" in capsys.readouterr().out


@pytest.mark.parametrize("side", ["tasks", "comparator"])
def test_a_control_runs_the_seeds_of_its_offset(tiny_run, tmp_path, side):
    sweep = compose_sweep(tiny_run("tying=LoRA", *WORDS[1:]))
    control = claims_file(tmp_path, 0.2, rule="level_within", sides=("LoRA", "LoRA"))
    text = (tmp_path / "claims.yaml").read_text().replace(f"8}}\n    {side}", f"8, seed_offset: 5}}\n    {side}")
    (tmp_path / "claims.yaml").write_text(text.replace("looks: [2, 5]", "looks: [2]"))
    launcher = Here()
    decide(sweep, control, launcher)
    assert seeds(launcher) == {0, 1, 5, 6}
    (verdict,) = verdicts(sweep)
    assert (verdict["look"], verdict["open"]) == (1, False)


def test_a_claim_that_needs_the_base_is_refused_without_it(tiny_run, tmp_path):
    sweep = compose_sweep(tiny_run(*WORDS, "score.base=false"))
    with pytest.raises(UserError, match=r"score\.base=false: the claim 'the method has a lower loss' needs"):
        decide(sweep, claims_file(tmp_path, 0.1, rule="retains"), Here())
