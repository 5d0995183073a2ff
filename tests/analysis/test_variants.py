"""Names of groups that differ in long values."""

from helpers.report_runs import scored_run

from tiedlora.analysis.variants import differing_values
from tiedlora.page import readme, write

GOOD, BASE = [1.0, 0.0] * 20, [0.0] * 40


def test_long_values_are_cut_and_stay_different():
    prompts = ["Solve the following problem. {q}", "Solve the following problem step by step. {q}"]
    names = differing_values(["a", "a"], [{"prompt": prompt} for prompt in prompts])
    assert all(name.startswith("prompt=Solve the following p... #") for name in names)
    assert len(set(names)) == 2
    assert differing_values(["a", "a"], [{"x": prompts[0]}, {"x": "short"}]) == [
        "x=Solve the following p...",
        "x=short",
    ], "a hash stands only where it is needed"


def test_no_group_is_lost_from_the_overview(tmp_path):
    for right, layers in ((GOOD, [*range(10), *range(20, 30)]), (BASE, list(range(20)))):
        scored_run(tmp_path, right, BASE, name="TAB", changes={"config.tying.layers": layers})
    report = write.build([tmp_path])
    (table,) = report.tables().overview
    assert len(table.rows) == 2
    text = readme.filled("<!-- report: overview -->\n<!-- end of report -->\n", report)
    assert text.count("TAB") == 2
