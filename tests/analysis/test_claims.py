"""Claims files: every rule and plan can be written, and mistakes name the key."""

import pytest

from tiedlora.analysis import claims, rules
from tiedlora.analysis.rules import Better, Level, Retains
from tiedlora.config.project import PROJECT
from tiedlora.errors import UserError

FILE = PROJECT / "claims" / "tied_lora.yaml"


def read(tmp_path, text):
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    return claims.read(path)


def entry(rule="retains: 0.9", tasks="[]", top="looks: [3, 5]"):
    return (
        f"{top}\nclaims:\n  - name: x\n    method: {{configuration: TAB, rank: 8}}\n"
        f"    comparator: {{configuration: LoRA, rank: 1}}\n    {rule}\n    tasks: {tasks}\n"
    )


def test_the_shipped_file_states_the_papers_claims():
    first, second = claims.read(FILE)
    assert first.rule == Retains(0.9)
    assert (first.method.rank, first.comparator.at) == (8, "equal_rank")
    assert second.rule == Better(0.0)
    assert (second.method.at, second.comparator.rank) == ("equal_parameters", 1)
    assert first.plan.looks == rules.planned((3, 5, 8, 12))
    assert first.plan.of_look(1) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("retains: 0.8", Retains(0.8)),
        ("better_by: 0", Better(0.0)),
        ("level_within: 0.1", Level(0.1)),
    ],
)
def test_every_rule_has_a_key(tmp_path, rule, expected):
    (claim,) = read(tmp_path, entry(rule))
    assert claim.rule == expected


def test_a_claim_names_its_tasks_and_their_metrics(tmp_path):
    (every,) = read(tmp_path, entry())
    (some,) = read(tmp_path, entry(tasks="[squad]"))
    (named,) = read(tmp_path, entry(tasks="{squad: f1, gsm8k: target_loss}"))
    assert every.covers("squad")
    assert some.metrics == {"squad": ""}
    assert not some.covers("gsm8k")
    assert named.metrics == {"squad": "f1", "gsm8k": "target_loss"}


def test_a_plan_may_name_its_levels_and_its_seeds(tmp_path):
    (claim,) = read(tmp_path, entry(top="looks: [3, 5]\nlevels: [0.01, 0.04]\nseeds: [7, 3, 5, 2, 9]"))
    assert claim.plan.looks.levels == (0.01, 0.04)
    assert claim.plan.of_look(0) == (7, 3, 5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("retains: 0.9", "retains: 2"), r"claims\.0\.retains=2: Input should be less than 1"),
        (("retains: 0.9", "retains: .nan"), r"claims\.0\.retains=nan: is not a finite number"),
        (("retains: 0.9", "better_by: -0.1"), r"better_by=-0\.1: Input should be greater than or equal to 0"),
        (
            ("    retains: 0.9\n", ""),
            r"claims\.0: needs exactly one rule of retains, better_by, level_within; it has none",
        ),
        (("    retains: 0.9\n", "    retains: 0.9\n    better_by: 0\n"), "it has retains, better_by"),
        (("retains: 0.9", "retains: null"), "it has none"),
        (("retains: 0.9", "margin: 0.02"), r"claims\.0\.margin: unknown key"),
        (
            ("at: equal_rank", "at: equal_size"),
            r"comparator\.at='equal_size': Input should be 'equal_rank' or 'equal_parameters'",
        ),
        (("TABuv, rank: 8", "TABuv, rank: big"), r"method\.rank='big': Input should be a valid integer"),
        (("TABuv, rank: 8", "TABuv, at: equal_rank"), "both have 'at'"),
        (("    tasks: []\n", ""), r"claims\.0\.tasks: is missing"),
        (("    tasks: []\n", "    tasks: [1]\n"), "must be a list of task names"),
        (
            ("    tasks: []\n", "    tasks: []\n    tusks: []\n"),
            r"claims\.0\.tusks: unknown key \(did you mean tasks\?\)",
        ),
        (("looks: [3, 5, 8, 12]", "looks: [5, 3]"), "increasing"),
        (("looks: [3, 5, 8, 12]", "looks: many"), "looks='many': Input should be a valid list"),
        (("looks: [3, 5, 8, 12]", "looks: [3, 5]\nlevels: [0.05, 0.05]"), "their sum"),
        (("looks: [3, 5, 8, 12]", "looks: [3, 5]\nlevels: [0.05]"), "one number in"),
        (("looks: [3, 5, 8, 12]", "looks: [3]\nseeds: [0, 1]"), "at least 3 different seeds"),
        (("looks: [3, 5, 8, 12]", "look: [3]"), r"look: unknown key \(did you mean looks\?\)"),
        (("claims:", "claim:"), r"claim: unknown key \(did you mean claims\?\)"),
        (("paper:", "paper: ["), "not readable YAML"),
        (
            ("TABuv is better than", "TABuv at rank 8 keeps 90 % of LoRA's gain at equal rank # "),
            "two claims have the name",
        ),
        (("name: TABuv at", "name: ''  #"), r"claims\.0\.name='': String should have at least 1 character"),
        (("LoRA, at: equal_rank", "TABuv, at: equal_rank"), "compares TABuv with itself; seed_offset on one side"),
        (("LoRA, at: equal_rank", "TABuv, rank: 8"), "compares TABuv with itself"),
        (("LoRA, at: equal_rank", "LoRA, at: equal_rank, rank: 2"), r"comparator: needs either rank, or at"),
        (("TABuv, rank: 8", "TABuv"), r"method: needs either rank, or at"),
        (("TABuv, rank: 8", "TABuv, rank: 8, seed_offset: -5"), r"seed_offset=-5: Input should be greater than or"),
        (("{configuration: TABuv, rank: 8}", "[TABuv, 8]"), r"claims\.0\.method=\['TABuv', 8\]: Input should be"),
        (("looks: [3, 5, 8, 12]", "looks: [3, 100000000]"), "looks at 100,000,000 seeds: at most 1,000 are allowed"),
        (("looks: [3, 5, 8, 12]", "looks: [3, 3]"), "increasing"),
        (("looks: [3, 5, 8, 12]", "looks: [0, 3]"), r"looks\.0=0: Input should be greater than or equal to 2"),
        (("looks: [3, 5, 8, 12]", "looks: []"), "increasing"),
        (("looks: [3, 5, 8, 12]", "looks: [3]\nseeds: [0, 1, 1]"), "at least 3 different seeds"),
        (
            ("looks: [3, 5, 8, 12]", "looks: [3]\nseeds: [0, 1, 9999999999]"),
            r"seeds\.2=9999999999: Input should be less",
        ),
        (("looks: [3, 5, 8, 12]", "looks: [3]\nlevels: [2]"), "one number in"),
    ],
)
def test_mistakes_name_the_key(tmp_path, change, says):
    text = FILE.read_text()
    assert change[0] in text
    with pytest.raises(UserError, match=says):
        read(tmp_path, text.replace(*change, 1))


# What a claim can name: two runs' configurations, and the metrics that one of them has on a task of its own.
RUNS = {"mine", "custom (mine)"}, {"own_task": {"accuracy"}, "squad": {"f1"}}
NAMES = {
    "a configuration": (("on: TABuv", "on: TABvu"), "method.configuration=TABvu: no run here", "(did you mean TABuv?)"),
    "a method of PEFT": (
        ("LoRA, at", "peft/vea, at"),
        "comparator.configuration=peft/vea:",
        "(did you mean peft/vera?)",
    ),
    "a configuration of runs": (("on: TABuv", "on: mime"), "method.configuration=mime:", "(did you mean mine?)"),
    "a task": (
        ("    tasks: []", "    tasks: {sqad: f1}"),
        "tasks: sqad: no run here has this name",
        "(did you mean squad?)",
    ),
    "a task of runs": (("    tasks: []", "    tasks: [own_tsk]"), "tasks: own_tsk:", "(did you mean own_task?)"),
    "a metric": (
        ("    tasks: []", "    tasks: {squad: exact_mach}"),
        "squad has no metric exact_mach; it has exact_match, f1",
        "(did you mean exact_match?)",
    ),
    "a metric of runs": (
        ("    tasks: []", "    tasks: {own_task: accurcy}"),
        "own_task has no metric accurcy;",
        "(did you mean accuracy?)",
    ),
}


@pytest.mark.parametrize("what", NAMES)
def test_a_name_that_exists_nowhere_is_refused_with_the_nearest(tmp_path, what):
    change, says, meant = NAMES[what]
    path = tmp_path / "claims.yaml"
    path.write_text(FILE.read_text().replace(*change, 1))
    with pytest.raises(UserError) as refused:
        claims.check_names(path, claims.read(path), *RUNS)
    message = str(refused.value)
    assert message.startswith(f'{path}: claim "TABuv at rank 8 keeps 90 % of LoRA\'s gain at equal rank": ')
    assert says in message
    assert message.endswith(meant)


def test_what_exists_in_conf_or_in_the_runs_can_be_claimed(tmp_path):
    text = FILE.read_text().replace("TABuv, rank", "mine, rank").replace("LoRA, at", "peft/vera, at")
    for tasks in ("[own_task]", "{own_task: accuracy, squad: exact_match, gsm8k: target_loss}", "{iwslt2017: bleu}"):
        path = tmp_path / "claims.yaml"
        path.write_text(text.replace("tasks: []", f"tasks: {tasks}"))
        claims.check_names(path, claims.read(path), *RUNS)


@pytest.mark.parametrize(
    "path", [FILE, *sorted(PROJECT.glob("studies/*/claims.yaml"))], ids=lambda path: path.parent.name
)
def test_the_committed_claims_are_valid_before_any_run(path):
    claims.check_names(path, claims.read(path), (), {})
