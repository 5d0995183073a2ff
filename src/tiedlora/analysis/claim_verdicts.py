"""One verdict for each claim and model, over all tasks of the claim.

Supported if every informative task supports the claim, and at least one task is informative. Contradicted if Holm's
procedure over the planned tasks (Scand. J. Statist. 6, 1979) contradicts it on at least one task, so that many tasks
do not make a wrong verdict more likely. Otherwise undecided, or uninformative if no task is informative.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tiedlora.analysis import looks
from tiedlora.analysis.answers import Answer, Verdict
from tiedlora.analysis.claims import Claim


@dataclass(frozen=True)
class ClaimVerdict:
    """The verdict on a claim for one model, and the answers that it rests on."""

    claim: Claim
    model: str
    """Empty if no run of the claim exists."""
    verdict: Verdict
    reason: str
    answers: tuple[Answer, ...]

    @property
    def exploratory(self) -> bool:
        """Whether it rests on a verdict outside the plan."""
        return any(answer.exploratory for answer in self.answers)


def claim_verdicts(answers: Sequence[Answer]) -> list[ClaimVerdict]:
    """The verdicts in the order of the claims. Tasks without a run of a model are part of its verdict.

    Args:
        answers: those of one claim follow each other, as answer_claims returns them.
    """
    verdicts = []
    for _, group in itertools.groupby(answers, key=lambda answer: id(answer.claim)):
        of_model: dict[str, list[Answer]] = {}
        for answer in group:
            of_model.setdefault(answer.model, []).append(answer)
        verdicts += [_verdict(own, model) for model, own in of_model.items()]
    return verdicts


def _verdict(answers: Sequence[Answer], model: str) -> ClaimVerdict:
    informative = [answer for answer in answers if answer.verdict != Verdict.UNINFORMATIVE]
    contradicting = [
        answer
        for answer, is_rejected in zip(
            answers, looks.holm([a.contradicted_level for a in answers], looks.TOTAL), strict=True
        )
        if is_rejected
    ]
    supporting = [answer for answer in informative if answer.verdict == Verdict.SUPPORTED]
    counts = f"{len(supporting)} of {len(informative)} informative tasks support it"
    if contradicting:
        names = ", ".join(answer.task for answer in contradicting)
        verdict, reason = Verdict.CONTRADICTED, f"contradicted on {names} (Holm over {len(answers)} tasks)"
    elif not informative:
        verdict, reason = Verdict.UNINFORMATIVE, "no task is informative"
    elif len(supporting) == len(informative):
        verdict, reason = Verdict.SUPPORTED, counts
    else:
        verdict, reason = Verdict.UNDECIDED, counts
    return ClaimVerdict(answers[0].claim, model, verdict, reason, tuple(answers))


def error_note(answers: Sequence[Answer]) -> str:
    """How many verdicts there are, and how many wrong ones the levels allow."""
    tested = [answer for answer in answers if answer.look is not None or answer.exploratory]
    decided = [answer for answer in tested if answer.verdict in (Verdict.SUPPORTED, Verdict.CONTRADICTED)]
    if not tested:
        return "No planned look has been taken yet."
    wrong = looks.TOTAL * len(tested)
    return (
        f"Verdicts (supported or contradicted): {len(decided)}. Comparisons that were tested: {len(tested)}. With "
        f"every truth at the boundary, {100 * looks.TOTAL:g} % of the comparisons ({wrong:.1f}) would get a wrong "
        "verdict."
    )
