"""A report on the terminal: what was found in one screen, and with `--all` every claim, arm and folder."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from tiedlora.analysis import shares
from tiedlora.analysis.answers import Answer, Verdict
from tiedlora.analysis.claims import Claim, Pair
from tiedlora.analysis.ranking import RankedArm
from tiedlora.analysis.results import ResultRow
from tiedlora.analysis.runs import LeftOut, Measure
from tiedlora.analysis.tested import number_tested
from tiedlora.page import ranked
from tiedlora.page.ranked import difference, in_words
from tiedlora.page.write import Report
from tiedlora.records.interval import MISSING, Unit
from tiedlora.screen import FirstThatFits, table
from tiedlora.text import clock, counted, number_list, visible

MOST_ROWS = 22
"""The most rows of the tables in one screen; those of the first claims are shown."""
MOST_UNDECIDED = 4
"""The most lines on what more runs would decide."""
MOST_NAMED = 3
"""The most failed or damaged folders that one screen names."""
STYLES = {
    Verdict.SUPPORTED: "green",
    Verdict.CONTRADICTED: "red",
    Verdict.UNDECIDED: "yellow",
    **dict.fromkeys((Verdict.UNINFORMATIVE, Verdict.CANNOT_FAIL, Verdict.NOT_RUN), "dim"),
}
SILENT = (Verdict.UNINFORMATIVE, Verdict.CANNOT_FAIL)
"""Verdicts that find nothing."""
KEY = (
    "As tested: adapter minus the other, or the share of its gain that is kept, by the first verdict's rule.\n"
    "? undecided. * holds over all tests (Holm)"
)
HEADS = ("model", "task", "metric", "adapter", "size", "score", "against", "as tested", "verdict")
NUMBERS = ("size", "score")
TITLE = 3
"""How many of the columns are a title above the rows where the screen is narrow."""


def parts(report: Report, out: Path, *, everything: bool = False) -> Iterator[RenderableType]:
    """What the command prints, part by part."""
    yield Text(visible(f"{report.headline()}."), style="bold")
    has_models = len({group.model for group in report.groups}) > 1
    yield from _found(_compared(report, everything=everything), None if everything else MOST_ROWS, has_models)
    rankings = report.rankings if everything else _without_claims(report)
    for ranking in rankings:
        yield from ranked.parts(ranking, None if everything else MOST_ROWS // len(rankings), has_models)
    yield from _undecided(report.answers)
    if everything:
        yield from _reasons(report)
        yield from (f"left out: {visible(folder.path.name)}: {visible(folder.reason)}" for folder in report.left_out)
    else:
        yield from _not_shown(report)
    yield f"open {visible(str(out / 'index.html'))}"


def _without_claims(report: Report) -> list[list[RankedArm]]:
    """The rankings of tasks without a claim."""
    # Without a pair, a claim has no numbers to show.
    asked = {(answer.model, answer.task) for answer in report.answers if isinstance(answer.pair, Pair)}
    return [own for own in report.rankings if (own[0].group.model, own[0].group.task_in_words) not in asked]


# --- What was found: a row for each pair of arms that claims compare by one metric.


@dataclass(frozen=True)
class _Compared:
    """The answers about one pair of arms by one metric."""

    pair: Pair
    measure: Measure
    answers: Sequence[Answer]
    row: ResultRow | None
    """The method's numbers."""

    def cells(self, *, in_short: bool) -> list[str | Text]:
        """The cells of HEADS.

        Args:
            in_short: a difference has only the ends of its interval.
        """
        first, unit, method = self.answers[0], self.measure.unit, self.pair.method
        score = None if self.row is None else self.row.score
        # Two claims may ask the same.
        said = {_verdict(answer): STYLES[answer.verdict] for answer in self.answers}
        return [
            first.model,
            first.task,
            self.measure.metric,
            in_words(method.name),
            f"{method.params:,}",
            MISSING if score is None else unit.number(score.value),
            _against(first.claim, self.pair),
            _tested(first, in_short),
            Text(", ").join(Text(words, style=style) for words, style in said.items()),
        ]


def _tested(answer: Answer, in_short: bool) -> str:
    """The number that the rule tests, at the level and with the seeds of its look, as the page has it."""
    number = number_tested(answer)
    if number is None or answer.measure is None:
        return MISSING
    if number.is_share:
        return shares.share_in_words(number.interval, number.zone)
    return difference(answer.measure.unit, number.interval, in_short)


def _against(claim: Claim, pair: Pair) -> str:
    """The comparator; a point of a curve has the size of the method."""
    return f"{claim.comparator.frontier}, same size" if claim.comparator.frontier else in_words(pair.comparator.name)


def _question(answer: Answer) -> str:
    """What the claim asks, such as `better`, `level` or `keeps 90 %`."""
    rule, unit = answer.claim.rule, answer.measure.unit if answer.measure else Unit.PLAIN
    if rule.margin is not None:
        return f"better by {unit.number(rule.margin)}" if rule.margin else "better"
    return f"keeps {100 * rule.low:g} %" if rule.high > 2 else "level"


def _verdict(answer: Answer) -> str:
    """The answer in one to three words, with the signs of KEY."""
    question, star = _question(answer), " *" if answer.survives_holm else ""
    if answer.verdict == Verdict.SUPPORTED:
        return question + star
    if answer.verdict == Verdict.CONTRADICTED:
        return _opposite(answer) + star
    return f"{question}?" if answer.verdict == Verdict.UNDECIDED else str(answer.verdict)


def _opposite(answer: Answer) -> str:
    """What is shown where the claim is contradicted."""
    rule = answer.claim.rule
    if rule.margin == 0:
        return "worse"
    if rule.margin is None and rule.high > 2:
        return f"keeps < {100 * rule.low:g} %"
    return f"not {_question(answer)}"


def _compared(report: Report, *, everything: bool) -> list[_Compared]:
    """Every pair that claims compare by one metric, in the order of the claims; with `everything`, also where no answer
    finds anything.
    """
    of_pair: dict[tuple[str, Measure, str, str], list[Answer]] = defaultdict(list)
    for answer in report.answers:
        pair = answer.pair
        is_shown = everything or answer.verdict not in SILENT
        if isinstance(pair, Pair) and answer.measure is not None and is_shown:
            of_pair[pair.anchor.setting, answer.measure, pair.method.name, pair.comparator.name].append(answer)
    rows = {(row.group.setting, row.measure, row.group.name): row for row in report.rows}
    found = []
    for (setting, measure, method, _), answers in of_pair.items():
        found.append(_Compared(pair_of(answers[0]), measure, answers, rows.get((setting, measure, method))))
    return found


def pair_of(answer: Answer) -> Pair:
    """The pair of an answer that has numbers."""
    assert isinstance(answer.pair, Pair)
    return answer.pair


def _found(all_pairs: Sequence[_Compared], most: int | None, has_models: bool) -> Iterator[RenderableType]:
    """The table of what claims compare.

    Args:
        most: the most pairs that are shown; None shows all.
        has_models: whether the report has several base models, so that each row names its own.
    """
    if not all_pairs:
        return
    # Those of the first claims, task by task.
    pairs = sorted(all_pairs[:most], key=lambda one: (one.answers[0].model, one.answers[0].task, one.measure.metric))
    whole = [one.cells(in_short=False) for one in pairs]
    shown = [at for at in range(len(HEADS)) if at or has_models]
    heads = [HEADS[at] for at in shown]
    short: dict[str, list[list[str | Text]]] = defaultdict(list)
    for one in pairs:
        cells = one.cells(in_short=True)
        title = ", ".join(str(cells[at]) for at in shown if at < TITLE)
        direction = "higher" if one.measure.sign > 0 else "lower"
        title += f" on {one.measure.split} ({one.measure.unit.words}; {direction} is better)"
        short[title].append(cells[TITLE:])
    yield FirstThatFits(
        table(heads, [[row[at] for at in shown] for row in whole], NUMBERS),
        _titled(short),
        _titled(short, without="score"),
    )
    if more := len(all_pairs) - len(pairs):
        yield Text(f"{counted(more, 'more pair')}: --all shows them", style="dim")
    yield Text(KEY, style="dim")


def _titled(blocks: Mapping[str, list[list[str | Text]]], without: str = "") -> Group:
    """Rows below their titles, with columns of one width. The head stands once.

    Args:
        without: the name of a column that is left out.
    """
    drawn: list[RenderableType] = []
    heads = HEADS[TITLE:]
    shown = [at for at, head in enumerate(heads) if head != without]
    widths = [max(len(heads[at]), *(len(row[at]) for rows in blocks.values() for row in rows)) for at in shown]
    for number, (title, rows) in enumerate(blocks.items()):
        block = table([heads[at] for at in shown], [[row[at] for at in shown] for row in rows], NUMBERS)
        block.show_header = number == 0
        # The verdict may wrap.
        for column, width in list(zip(block.columns, widths, strict=True))[:-1]:
            column.min_width = width
        drawn += [Text(visible(title), style="bold"), block]
    return Group(*drawn)


# --- What is undecided, and what would decide it.


def _undecided(answers: Sequence[Answer]) -> Iterator[RenderableType]:
    asked = [answer for answer in answers if answer.findings.looks or answer.verdict != Verdict.NOT_RUN]
    open_ones = [answer for answer in asked if answer.verdict == Verdict.UNDECIDED]
    if not open_ones:
        return
    counts = f"{len(open_ones)} of {len(asked)} answers"
    yield Text(f"Undecided: {counts}. What would decide them, and how likely it does:", style="bold")
    by_runs: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    stuck: Counter[str] = Counter()
    for answer in open_ones:
        if answer.lacking:
            by_runs[answer.pair.anchor.setting if answer.pair else "", _runs(answer)].append(answer)
        else:
            needed = answer.decide if isinstance(answer.pair, Pair) else answer.reason
            stuck["no planned look is likely to decide" if answer.is_futile else needed] += 1
    likely_first = sorted(by_runs.items(), key=lambda item: -max(answer.chance or 0.0 for answer in item[1]))
    for (_, runs), own in likely_first[:MOST_UNDECIDED]:
        yield _indented(f"{_cost(runs, own)}: {_questions(own)}")
    if more := sum(len(own) for _, own in likely_first[MOST_UNDECIDED:]):
        yield _indented(f"{more} more by other runs: --all says which")
    yield from (_indented(f"{count}: {decide}") for decide, count in stuck.most_common(MOST_UNDECIDED))


def _indented(text: str) -> RenderableType:
    return Padding(Text(visible(text)), (0, 0, 0, 2), expand=False)


def _runs(answer: Answer) -> str:
    """The runs that the next look needs, such as `seeds 13, 14 of Tuv r 8`."""
    of_seeds: dict[str, list[str]] = defaultdict(list)
    for name, lacking in answer.lacking.items():
        noun = "seed" if len(lacking) == 1 else "seeds"
        of_seeds[f"{noun} {number_list(lacking)}"].append(in_words(name))
    return ", ".join(f"{seeds} of {' and '.join(names)}" for seeds, names in of_seeds.items())


def _cost(runs: str, answers: Sequence[Answer]) -> str:
    """The runs, their number, and how long they train, by the mean time of their arm."""
    pair, lacking = pair_of(answers[0]), answers[0].lacking
    seconds = {side.name: mean(run.record.training.seconds for run in side.runs) for side in pair.sides if side.runs}
    time = sum(len(seeds) * seconds.get(name, 0.0) for name, seeds in lacking.items())
    return f"{counted(sum(map(len, lacking.values())), 'run')}, {clock(time)} of training ({runs})"


def _questions(answers: Iterable[Answer]) -> str:
    """What the runs would decide, with the chance that they do."""
    of_arm: dict[str, list[str]] = defaultdict(list)
    for answer in answers:
        chance = "" if answer.chance is None else f" (chance {100 * answer.chance:.0f} %)"
        of_arm[f"{answer.task} {in_words(pair_of(answer).method.name)}"].append(f"{_question(answer)}{chance}")
    return "; ".join(f"{arm} {', '.join(questions)}" for arm, questions in of_arm.items())


# --- What one screen leaves out.


def _not_shown(report: Report) -> Iterator[RenderableType]:
    """One line of counts, and the failed or damaged folders by name if they are few."""
    not_run = sum(verdict.verdict == Verdict.NOT_RUN for verdict in report.verdicts)
    silent = sum(answer.verdict in SILENT for answer in report.answers)
    pruned = sum(folder.run is not None and folder.run.ending == "pruned" for folder in report.left_out)
    others = [folder for folder in report.left_out if folder.run is None or folder.run.ending != "pruned"]
    counts = {
        ("claim", " not run"): not_run,
        ("answer", " without a finding"): silent,
        ("adapter", " that no claim compares"): _uncompared(report),
        ("run", " pruned by a search"): pruned,
        ("other folder", ""): len(others) if len(others) > MOST_NAMED else 0,
    }
    if said := [counted(count, noun) + rest for (noun, rest), count in counts.items() if count]:
        yield Text(f"Not shown: {', '.join(said)} (--all)", style="dim")
    if len(others) <= MOST_NAMED:
        yield from (_of_folder(folder) for folder in others)


def _uncompared(report: Report) -> int:
    """How many ranked arms are in no claim, of the tasks with claims."""
    pairs = [answer.pair for answer in report.answers if isinstance(answer.pair, Pair)]
    compared = {(group.setting, group.name) for pair in pairs for group in (pair.method, *pair.comparator.groups)}
    shown = [arm for ranking in _without_claims(report) for arm in ranking]
    ranked_arms = {(arm.group.setting, arm.group.name) for ranking in report.rankings for arm in ranking}
    return len(ranked_arms - compared - {(arm.group.setting, arm.group.name) for arm in shown})


def _of_folder(folder: LeftOut) -> Text:
    return Text(f"Left out: {visible(folder.path.name)}: {visible(folder.reason)}", style="yellow")


# --- Everything.


def _reasons(report: Report) -> Iterator[RenderableType]:
    """Every answer with its reason, below the verdict over all tasks of its claim."""
    for verdict in report.verdicts:
        if len(verdict.answers) > 1:
            model = f" [{verdict.model}]" if verdict.model else ""
            yield _reason(verdict.verdict, f"{verdict.claim.name}{model}: {verdict.reason}")
            # Its tasks would say the same.
            if verdict.verdict == Verdict.NOT_RUN:
                continue
        for answer in verdict.answers:
            yield from _of_answer(answer)


def _reason(verdict: Verdict, text: str) -> Text:
    return Text.assemble((f"{verdict:<14}", STYLES[verdict]), f" {visible(text)}")


def _of_answer(answer: Answer) -> Iterator[RenderableType]:
    found, difference, share = answer.findings, "", ""
    if found.difference and answer.measure:
        seeds = counted(found.difference_seeds, "seed")
        difference = f" {answer.measure.unit.text(found.difference.widest, '+')} ({seeds})"
    if found.retains_at_least is not None:
        share = f", retains at least {shares.at_least(found.retains_at_least)}"
    decide = f"; next: {answer.decide}" if answer.decide else ""
    where = f"{answer.model} {answer.task}".strip()
    yield _reason(answer.verdict, f"{answer.claim.name} [{where}]{difference}{share}")
    yield Text(f"  {visible(answer.reason)}{visible(decide)}")
