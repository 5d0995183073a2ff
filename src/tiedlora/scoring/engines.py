"""The programs that can write a split's answers, behind one interface: `score.engine` names one.

Each gives nearly the texts of the others. They add in another order, so in bfloat16 a greedy answer may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, Protocol

from tiedlora.adapter import TiedAdapter
from tiedlora.records.rows import PredictionRow
from tiedlora.records.run_record import EngineRecord
from tiedlora.scoring import continuous, decoding, vllm_engine
from tiedlora.scoring.answer_ends import Output
from tiedlora.scoring.steps import StaticSteps

OURS = "transformers"
"""This project's own decoding of transformers' models."""
COMPARED_ROWS = 16
"""So many answers of another engine are compared with ours."""


class Engine(Protocol):
    """Writes greedy answers."""

    def __call__(
        self,
        model: Any,
        /,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str],
        more_ends: Sequence[int],
        batch_size: int,
        batch_tokens: int | None,
        progress: Callable[[int], None],
    ) -> list[Output]:
        """The answers, in the order of `prompts`. The arguments are those of decoding.generate."""
        ...


def engine(name: str, adapter: TiedAdapter | None, active: bool) -> Engine:
    """The engine that `score.engine` names.

    Args:
        adapter: the run's adapter, and `active` whether the model adds it. (Only vLLM needs to be told, because it has
            a model of its own.) None for the arm of another method, which vLLM cannot serve.
    """
    if name == "vllm":
        assert adapter is not None, "config/check.py refuses vLLM for the arm of another method"
        return partial(vllm_engine.generate, adapter=adapter, active=active)
    engines: dict[str, Engine] = {
        OURS: decoding.generate,
        "static": partial(decoding.generate, steps=StaticSteps),
        "continuous": continuous.generate,
    }
    return engines[name]


def check_usable(name: str, processes: int) -> None:
    """Refuse an engine that cannot run here, before anything is trained.

    Args:
        processes: how many processes score together.

    Raises:
        UserError: its package or its device is missing, or it takes only one process.
    """
    if name == "vllm":
        vllm_engine.check_usable(processes)


def compared_places(rows: int) -> list[int]:
    """The numbers of the rows whose answers are compared with ours: COMPARED_ROWS of them, evenly over the split."""
    compared = min(COMPARED_ROWS, rows)
    return [place * rows // compared for place in range(compared)]


def agreement(name: str, answers: Sequence[PredictionRow], ours: Sequence[PredictionRow]) -> EngineRecord:
    """How many answers of an engine are exactly ours.

    Args:
        answers: the engine's rows, and `ours` those of OURS to the same examples.
    """
    same = sum(answer.output == own.output for answer, own in zip(answers, ours, strict=True))
    return EngineRecord(name, version("vllm" if name == "vllm" else "transformers"), len(answers), same)
