"""One verdict on a claim over all of its tasks.

It is contradicted by Holm's procedure over the tasks, so that many tasks do not make a wrong verdict more likely.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tiedlora.analysis import rules
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


def claim_verdicts(answers: Sequence[Answer]) -> list[ClaimVerdict]:
    """The verdicts over all tasks, in the order of the claims. Tasks without a run of a model are part of its verdict.

    Args:
        answers: those of one claim follow each other, as answer_claims returns them.
    """
    of_claim: dict[tuple[int, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        of_claim[id(answer.claim), answer.model].append(answer)
    return list(map(_over_tasks, of_claim.values()))


def _over_tasks(answers: Sequence[Answer]) -> ClaimVerdict:
    silent = (Verdict.UNINFORMATIVE, Verdict.CANNOT_FAIL, Verdict.NOT_RUN)
    informative = [answer for answer in answers if answer.verdict not in silent]
    rejected = rules.holm([answer.findings.contradicted_level for answer in answers])
    contradicting = list(itertools.compress(answers, rejected))
    supporting = [answer for answer in informative if answer.verdict == Verdict.SUPPORTED]
    counts = f"{len(supporting)} of {len(informative)} informative tasks support it"
    alone = [answer.task for answer in answers if answer.verdict == Verdict.CONTRADICTED]
    counts += f"; contradicted on {', '.join(alone)}, not by Holm over {len(answers)} tasks" if alone else ""
    not_run = [answer.task for answer in answers if answer.verdict == Verdict.NOT_RUN]
    counts += f"; not run: {', '.join(not_run)}" if not_run else ""
    if contradicting:
        names = ", ".join(answer.task for answer in contradicting)
        verdict, reason = Verdict.CONTRADICTED, f"contradicted on {names} (Holm over {len(answers)} tasks)"
    elif all(answer.verdict == Verdict.NOT_RUN for answer in answers):
        verdict, reason = Verdict.NOT_RUN, "no task is run"
    elif not informative and not not_run:
        verdict, reason = Verdict.UNINFORMATIVE, "no task is informative"
    elif len(supporting) == len(informative) and not not_run:
        verdict, reason = Verdict.SUPPORTED, counts
    else:
        verdict, reason = Verdict.UNDECIDED, counts
    return ClaimVerdict(answers[0].claim, answers[0].model, verdict, reason, tuple(answers))
