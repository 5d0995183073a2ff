"""Claims files: every rule and plan can be written, files of version 0.1 still read, and mistakes name the key."""

import pytest

from tiedlora.analysis import claims, looks
from tiedlora.analysis.rules import Better, Level, Retains, WithinMargin
from tiedlora.config.project import PROJECT
from tiedlora.errors import UserError

FILE = PROJECT / "claims" / "tied_lora.yaml"
VERSION_0_1 = """
paper: VeRA
claims:
  - name: Tuv keeps up
    method: {configuration: Tuv, rank: 8}
    comparator: {configuration: LoRA, at: equal_rank}
    margin: 0.05
    tasks: [squad]
    minimum_seeds: 6
"""


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
    assert first.plan.looks == looks.planned((3, 5, 8, 12))
    assert first.plan.of_look(1) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("retains: 0.8", Retains(0.8)),
        ("better_by: 0", Better(0.0)),
        ("level_within: 0.1", Level(0.1)),
        ("margin: 0.02", WithinMargin(0.02)),
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


def test_minimum_seeds_of_version_0_1_drops_the_earlier_looks(tmp_path):
    (claim,) = read(tmp_path, VERSION_0_1)
    assert claim.rule == WithinMargin(0.05)
    assert claim.plan.looks == looks.planned((8, 12))
    (late,) = read(tmp_path, VERSION_0_1.replace("seeds: 6", "seeds: 20"))
    assert late.plan.looks == looks.planned((20,))
    assert len(late.plan.of_look(0)) == 20


def test_minimum_seeds_keeps_the_declared_seeds(tmp_path):
    top = "looks: [3, 5]\nseeds: [7, 3, 5, 2, 9, 1, 8, 6]"
    text = entry(top=top).replace("    tasks: []\n", "    tasks: []\n    minimum_seeds: MINIMUM\n")
    (claim,) = read(tmp_path, text.replace("MINIMUM", "8"))
    assert claim.plan.of_look(0) == (7, 3, 5, 2, 9, 1, 8, 6)
    with pytest.raises(UserError, match="minimum_seeds=9: is more than the 8 seeds"):
        read(tmp_path, text.replace("MINIMUM", "9"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("retains: 0.9", "retains: 2"), r"claims\[0\].retains=2: must be in"),
        (("retains: 0.9", "retains: .nan"), r"claims\[0\].retains=nan: must be in"),
        (("retains: 0.9", "better_by: -0.1"), "better_by=-0.1: must be in"),
        (("    retains: 0.9\n", ""), "exactly one rule of retains, better_by, level_within, margin; it has none"),
        (("    retains: 0.9\n", "    retains: 0.9\n    margin: 0.1\n"), "it has retains, margin"),
        (("at: equal_rank", "at: equal_size"), "equal_rank, equal_parameters"),
        (("TABuv, rank: 8", "TABuv, rank: big"), "a whole number from 1"),
        (("TABuv, rank: 8", "TABuv, at: equal_rank"), "both have 'at'"),
        (("    tasks: []\n", ""), "has no key 'tasks'"),
        (("    tasks: []\n", "    tasks: [1]\n"), "must be a list of task names"),
        (("    tasks: []\n", "    tasks: []\n    tusks: []\n"), "unknown key 'tusks'"),
        (("looks: [3, 5, 8, 12]", "looks: [5, 3]"), "increasing"),
        (("looks: [3, 5, 8, 12]", "looks: many"), "must be a list of numbers of seeds"),
        (("looks: [3, 5, 8, 12]", "looks: [3, 5]\nlevels: [0.05, 0.05]"), "their sum"),
        (("looks: [3, 5, 8, 12]", "looks: [3, 5]\nlevels: [0.05]"), "one number in"),
        (("looks: [3, 5, 8, 12]", "looks: [3]\nseeds: [0, 1]"), "at least 3 different seeds"),
        (("looks: [3, 5, 8, 12]", "look: [3]"), "unknown key 'look'"),
        (("claims:", "claim:"), "needs the keys paper and claims"),
        (("paper:", "paper: ["), "not readable YAML"),
    ],
)
def test_mistakes_name_the_key(tmp_path, change, says):
    text = FILE.read_text()
    assert change[0] in text
    with pytest.raises(UserError, match=says):
        read(tmp_path, text.replace(*change, 1))


def test_a_minimum_below_five_was_never_allowed(tmp_path):
    with pytest.raises(UserError, match="minimum_seeds=3: must be 5 or more"):
        read(tmp_path, VERSION_0_1.replace("seeds: 6", "seeds: 3"))
