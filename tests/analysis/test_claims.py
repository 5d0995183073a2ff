"""Claims: every rule and plan can be written, mistakes name the key, and the right groups are compared."""

import re
import shutil

import numpy as np
import pytest
from helpers.report_runs import diverge, report_of_claim, scored_run, world

from tiedlora.analysis import claims, rules
from tiedlora.analysis.rules import better_by, retains
from tiedlora.analysis.runs import Names
from tiedlora.config import compose
from tiedlora.errors import UserError
from tiedlora.places import PROJECT
from tiedlora.tying import LrFactors

FILE = PROJECT / "claims" / "tied_lora.yaml"
LOOKS = "looks: [3, 5, 8, 12]"
OWN_FLOOR = "}\n    floor: {configuration: LoRA, at: equal_rank"
FIRST = "TABuv at rank 8 keeps 90 % of LoRA's gain at equal rank"


def read(tmp_path, text):
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    return claims.read(path)


def test_the_shipped_file_states_the_papers_claims():
    first, second = claims.read(FILE)
    assert first.rule == retains(0.9)
    assert (first.method.rank, first.comparator.at) == (8, "equal_rank")
    assert second.rule == better_by(0.0)
    assert (second.method.at, second.comparator.rank) == ("equal_parameters", 1)
    assert first.plan == rules.Plan((3, 5, 8, 12))
    assert first.plan.of_look(1) == (0, 1, 2, 3, 4)


def test_a_claim_names_its_tasks_and_their_metrics(tmp_path):
    (some, _), (named, _) = (
        read(tmp_path, FILE.read_text().replace("tasks: []", f"tasks: {tasks}"))
        for tasks in ("[squad]", "{squad: f1, gsm8k: target_loss}")
    )
    assert claims.read(FILE)[0].covers("squad")
    assert some.tasks == {"squad": ""}
    assert not some.covers("gsm8k")
    assert named.tasks == {"squad": "f1", "gsm8k": "target_loss"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("at: equal_rank", "at: same"), r"comparator\.at=same: must be 'equal_rank' or 'equal_parameters'"),
        (("TABuv, rank: 8", "TABuv"), "method: needs either rank, or at"),
        (("TABuv, rank: 8", "TABuv, at: equal_rank"), "both matched to the other side"),
        (("LoRA, at: equal_rank", "TABuv, at: equal_rank"), "compares TABuv with itself, and both .* seeds 0 to 2;"),
        (("LoRA, at: equal_rank", "TABuv, at: equal_rank, seed_offset: 1"), "seeds 1, 2; take a seed_offset of 3"),
        (("retains: 0.9", "retains: 2"), r"claims\.0\.retains=2: must be less than 1"),
        (("    retains: 0.9\n", ""), "needs exactly one rule of retains, better_by, level_within; it has none"),
        (("    retains: 0.9\n", "    retains: 0.9\n    better_by: 0\n"), "it has retains, better_by"),
        (("    tasks: []\n", ""), r"claims\.0\.tasks: is missing"),
        (("    tasks: []\n", "    tasks: [1]\n"), "must be a list of task names"),
        (("    tasks: []\n", "    tusks: []\n"), r"claims\.0\.tusks: unknown key \(did you mean tasks\?\)"),
        (("name: TABuv is better", f"name: {FIRST} #"), "two claims have the name"),
        ((LOOKS, "looks: [5, 3]"), "increasing"),
        ((LOOKS, "looks: [0, 3]"), r"looks\.0=0: must be greater than or equal to 2"),
        ((LOOKS, "looks: [3, 100000000]"), "looks at 100,000,000 seeds: at most 1,000 are allowed"),
        ((LOOKS, "looks: [3]\nseeds: [0, 1, 1]"), "at least 3 different seeds"),
        (("TA, rank: 8", "TA, rank: 8, seed_offset: 5"), "weakest: has the seeds of the plan"),
        ((LOOKS, f"{LOOKS}\nfloor: {{configuration: LoRA, at: equal_rank}}"), "floor is the comparator"),
        ((LOOKS, f"{LOOKS}\nfloor: {{configuration: LoRA, rank: 8}}"), "floor is the comparator, LoRA at equal rank,"),
        (
            ("LoRA, at: equal_rank", f"LoRA, rank: 8, seed_offset: 20{OWN_FLOOR}"),
            "the floor is the comparator, LoRA r=8",
        ),
        ((LOOKS, f"{LOOKS}\nfloor: {{configuration: TABuv, rank: 8}}"), "the floor is the method, TABuv r=8, whose"),
        ((LOOKS, f"{LOOKS}\nfloor: {{configuration: TABuv, at: equal_rank}}"), "the floor is the method"),
        (("configuration: LoRA, at: equal_rank", "frontier: TABuv"), "the method, TABuv r=8, is on the curve of TABuv"),
        (("claims:", "claim:"), r"claim: unknown key \(did you mean claims\?\)"),
        (("paper:", "paper: ["), "not readable YAML"),
    ],
)
def test_mistakes_name_the_key(tmp_path, change, says):
    text = FILE.read_text()
    assert change[0] in text
    with pytest.raises(UserError, match=says):
        read(tmp_path, text.replace(*change, 1))


# What a claim can name: two runs' configurations, and the metrics that one of them has on a task of its own.
RUNS = Names({"mine", "custom (mine)"}, {"own_task": {"accuracy"}, "squad": {"f1"}}, {"score.batch_tokens"})
NAMES = {
    "a configuration": (("on: TABuv", "on: TABvu"), "method.configuration=TABvu: no run here", "TABuv"),
    "a configuration of runs": (("on: TABuv", "on: mime"), "method.configuration=mime:", "mine"),
    "a task of runs": (("tasks: []", "tasks: [own_tsk]"), "tasks: own_tsk:", "own_task"),
    "a metric": (("tasks: []", "tasks: {squad: exact}"), "squad has no metric exact; it has drift, exa", "exact_match"),
    "a key": (
        ("tasks: []", "tasks: []\n    where: {train.step: 5}"),
        "where: train.step: is no key that",
        "train.steps",
    ),
    "a metric of runs": (("tasks: []", "tasks: {own_task: accurcy}"), "own_task has no metric accurcy;", "accuracy"),
}


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ('{train.steps: "100"}', "where: train.steps='100': must be a number, as in the runs"),
        ("{train.warmup_steps: true}", "where: train.warmup_steps=True: must be a number, as in the runs"),
        ("{seed: 0}", "where: seed: is no key that decides a setting"),
        ("{train.lr: 0.01}", "where: train.lr: is no key that decides a setting"),
    ],
)
def test_a_setting_that_no_run_can_have_is_refused(tmp_path, where, says):
    path = tmp_path / "claims.yaml"
    path.write_text(FILE.read_text().replace("tasks: []", f"tasks: []\n    where: {where}", 1))
    with pytest.raises(UserError, match=re.escape(says)):
        claims.check_names(path, claims.read(path), RUNS)


@pytest.mark.parametrize("what", NAMES)
def test_a_name_that_exists_nowhere_is_refused_with_the_nearest(tmp_path, what):
    (old, new), says, meant = NAMES[what]
    path = tmp_path / "claims.yaml"
    path.write_text(FILE.read_text().replace(old, new, 1))
    with pytest.raises(UserError) as refused:
        claims.check_names(path, claims.read(path), RUNS)
    message = str(refused.value)
    assert message.startswith(f'{path}: claim "TABuv at rank 8 keeps 90 % of LoRA\'s gain at equal rank": ')
    assert says in message
    assert message.endswith(f"(did you mean {meant}?)")


def test_an_earlier_name_is_answered_with_the_new_one(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text(FILE.read_text().replace("on: TABuv", "on: TABuv_v0", 1))
    with pytest.raises(UserError, match=r"method\.configuration=TABuv_v0: TABuv_v0 is TABuv now"):
        claims.check_names(path, claims.read(path), RUNS)


def test_what_exists_in_conf_or_in_the_runs_can_be_claimed(tmp_path):
    text = FILE.read_text().replace("TABuv, rank", "mine, rank").replace("LoRA, at", "peft/vera, at")
    for tasks in ("[own_task]", "{own_task: accuracy, squad: exact_match, gsm8k: target_loss}", "{iwslt2017: bleu}"):
        path = tmp_path / "claims.yaml"
        path.write_text(text.replace("tasks: []", f"tasks: {tasks}").replace("LoRA, rank: 1", "LoRA_l22, rank: 1"))
        claims.check_names(path, claims.read(path), RUNS)
    # A key that only the runs have.
    path.write_text(text.replace("tasks: []", "tasks: []\n    where: {score.batch_tokens: 4096}"))
    claims.check_names(path, claims.read(path), RUNS)


def test_a_broken_task_of_conf_is_an_error_and_no_task_without_metrics(tmp_path, monkeypatch):
    shutil.copytree(PROJECT / "conf" / "task", tmp_path / "task")
    monkeypatch.setattr(compose, "CONF", tmp_path)
    path = tmp_path / "claims.yaml"
    path.write_text(FILE.read_text().replace("tasks: []", "tasks: {squad: no_such_metric}"))
    task = tmp_path / "task" / "squad.yaml"
    task.write_text(task.read_text().replace("max_new_tokens: ", "max_new_tokens: many "))
    with pytest.raises(UserError, match="max_new_tokens"):
        claims.check_names(path, claims.read(path), RUNS)


# Which groups a claim compares.

CHANGES = {
    "rank.scaling": {"config.rank.scaling": "rslora"},
    "rank.alpha": {"config.rank.alpha": 16.0},
    "lr_factor.B": {"config.train.lr_factor": LrFactors(B=16.0)},
}
ONE, EIGHT = "LoRA, rank: 1", "TABuv, rank: 8"


@pytest.fixture
def answers(tmp_path):
    """The answers of the runs in `runs` to one claim."""

    def find(method=EIGHT, other="LoRA, at: equal_rank", rule="better_by: 0.0", roots=("runs",)):
        """`rule` may have more lines of the claim."""
        return report_of_claim(tmp_path, rule, method, f"configuration: {other}", roots=roots).answers

    return find


def add(tmp_path, name, success, changes=None, rank=8, seeds=3):
    """Seeds whose scores are near a rate of success."""
    for seed in range(seeds):
        draws = np.random.default_rng([seed, len(name)]).random(400)
        ours = (draws < success).astype(float)
        scored_run(tmp_path / "runs", ours, np.zeros(400), name=name, seed=seed, rank=rank, changes=changes)


@pytest.mark.parametrize(
    ("where", "steps"), [("", {50, 100}), ("train.steps: 50", {50}), ("train.steps: 50, model.name: other", set())]
)
def test_a_claim_is_asked_only_where_the_runs_have_its_values(tmp_path, answers, where, steps):
    for changes in ({"config.train.steps": 50}, None):
        add(tmp_path, "TABuv", 0.5, changes)
        add(tmp_path, "LoRA", 0.3, changes)
    found = answers(rule=f"better_by: 0.0\n    where: {{{where}}}")
    compared = [
        answer.pair.anchor.runs[0].record.identity.tree["train"]["steps"] for answer in found if answer.pair is not None
    ]
    assert set(compared) == steps
    assert len(compared) == len(steps)


@pytest.mark.parametrize(
    ("key", "value", "verdict"),
    [
        ("rank.alpha", 16, "contradicted"),
        ("rank.alpha", 8, "supported"),
        ("rank.scaling", "rslora", "contradicted"),
        # An identity leaves it out.
        ("rank.scaling", "standard", "supported"),
    ],
)
def test_both_sides_have_the_values_that_a_claim_asks_for(tmp_path, answers, key, value, verdict):
    """An arm's own values are no part of its setting, so the other comparator is there too."""
    for change, (ours, theirs) in ((None, (0.5, 0.3)), (CHANGES[key], (0.3, 0.5))):
        add(tmp_path, "TABuv", ours, change)
        add(tmp_path, "LoRA", theirs, change)
    (found,) = answers(rule=f"better_by: 0.0\n    where: {{{key}: {value}}}")
    assert found.verdict == verdict


@pytest.mark.parametrize("change", CHANGES)
def test_of_several_comparators_the_plain_one_is_compared(tmp_path, answers, change):
    add(tmp_path, "TABuv", 0.5)
    add(tmp_path, "LoRA", 0.3)
    add(tmp_path, "LoRA", 0.7, CHANGES[change])
    (found,) = answers()
    assert found.verdict == "supported"
    assert found.pair.comparator.is_plain


def test_if_none_of_several_fits_the_answer_names_them(tmp_path, answers):
    add(tmp_path, "TABuv", 0.5)
    for change in ("rank.scaling", "rank.alpha"):
        add(tmp_path, "LoRA", 0.3, CHANGES[change])
    (found,) = answers()
    assert found.verdict == "undecided"
    assert "several groups fit, and no single one is plain" in found.reason
    assert "rank.scaling=rslora" in found.reason


def test_equal_parameters_are_within_five_per_cent_and_the_budget_to_run_is_named(tmp_path, answers):
    """SmolLM2-135M: LoRA has 46,080 parameters at r = 1, TABuv has 41,328 at r = 8 and 46,026 at r = 11."""
    matched = "TABuv, at: equal_parameters"
    add(tmp_path, "LoRA", 0.5, rank=1)
    add(tmp_path, "TABuv", 0.7)
    (found,) = answers(matched, ONE)
    assert "nearest: r=8 with 41,328); train one with budget=46080" in found.reason
    add(tmp_path, "TABuv", 0.7, rank=11)
    (found,) = answers(matched, ONE)
    assert found.verdict == "supported"
    assert "TABuv r=11 against LoRA r=1" in found.reason


def test_a_configuration_is_compared_with_itself_on_other_seeds(tmp_path, answers):
    plain, later, level = "LoRA, rank: 8", "LoRA, rank: 8, seed_offset: 5", "level_within: 0.2"
    add(tmp_path, "LoRA", 0.6, seeds=5)
    (found,) = answers(plain, later, level)
    assert found.verdict == "undecided"
    world(tmp_path / "more", {"LoRA": 0.6}, seeds=10, rows=1000, seed_sd=0.002)
    for sides in ((plain, later), (later, plain)):
        (found,) = answers(*sides, level, roots=("more",))
        assert (found.verdict, found.findings.seeds) == ("supported", 3)
    assert "LoRA (seeds from 5) r=8 against LoRA r=8" in found.reason
    # Seeds 3 and 4 would be on both sides of the look at 5.
    (unclear,) = answers(plain, "LoRA, rank: 8, seed_offset: 3", "better_by: 0.0", roots=("more",))
    assert (unclear.verdict, unclear.findings.look.number) == ("undecided", 0)
    assert unclear.decide == "a larger seed_offset: with 5 seeds, both sides would have the same runs"
    diverge(tmp_path / "more", "*-s6-*")
    assert "4 seeds at level 3.7 %, 1 diverged" in answers(plain, later, level, roots=("more",))[0].reason


def test_a_missing_comparator_or_method_is_named(tmp_path, answers):
    add(tmp_path, "TABuv", 0.5)
    assert ["no finished run of LoRA r=8 in the same setting" in found.reason for found in answers()] == [True]
    assert ["no finished run of TAB r=8" in found.reason for found in answers("TAB, rank: 8")] == [True]
    assert [found.verdict for found in answers("TAB, at: equal_rank", "TABuv, rank: 8")] == ["not run"]


def test_a_changed_specification_answers_by_a_name_of_its_own_only(tmp_path, answers):
    add(tmp_path, "LoRA", 0.6)
    for name in ("TABuv", "mine"):
        for seed in range(3):
            changes = {"config.tying.dropout": 0.1, "config.tying.name": name}
            scored_run(tmp_path / name, [1.0] * 400, [0.0] * 400, seed=seed, changes=changes)
    (found,) = answers(roots=("runs", "TABuv"))
    assert "no finished run of TABuv r=8" in found.reason
    (found,) = answers("mine, rank: 8", roots=("runs", "mine"))
    assert "custom (mine) r=8 against LoRA r=8" in found.reason
    (found,) = answers("mine, rank: 8, shuffle_targets: true", roots=("runs", "mine"))
    assert "no finished run of mine (shuffled targets) r=8" in found.reason
