"""score.engine=vllm: a vLLM engine in this process, with the run's adapter as a LoRA on it.

**Untried**: vLLM needs a GPU, and none was at hand. It is written against the interface that vLLM 0.33 documents (LLM,
SamplingParams, LoRARequest). The engine stays for the next run of the same process, whose adapter is one more LoRA.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tiedlora.adapter import TiedAdapter
from tiedlora.errors import UserError
from tiedlora.export.peft import to_peft
from tiedlora.models.device import free_memory
from tiedlora.scoring.answer_ends import AnswerEnds, Output

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks for which vLLM can be started."""
LENGTH_STEP = 1024
"""The longest row of an engine is a multiple of this, so that the next split rarely needs a new engine."""
FREE_SHARE = 0.9
"""vLLM gets this share of the memory that our own model leaves free."""


@dataclass(frozen=True)
class _Wish:
    """What an engine is started for."""

    base: str
    revision: str | None
    dtype: str
    longest_row: int
    rank: int


class _Engine:
    """A running engine, and how many LoRAs it has seen."""

    current: _Engine | None = None

    def __init__(self, wish: _Wish) -> None:
        # Here and below: vLLM is an extra, and it takes many seconds to import.
        from vllm import LLM

        self.wish, self.loras = wish, 0
        free_memory()
        free, total = torch.cuda.mem_get_info()
        self.llm = LLM(
            model=wish.base,
            revision=wish.revision,
            tokenizer_revision=wish.revision,
            dtype=wish.dtype,
            max_model_len=wish.longest_row,
            enable_lora=True,
            max_lora_rank=wish.rank,
            gpu_memory_utilization=FREE_SHARE * free / total,
        )

    @classmethod
    def started(cls, wish: _Wish) -> _Engine:
        """The running engine, if it can do what is wished; otherwise a new one."""
        now = None if cls.current is None else cls.current.wish
        larger = now and replace(
            wish, longest_row=max(wish.longest_row, now.longest_row), rank=max(wish.rank, now.rank)
        )
        if now is None or now != larger:
            # The old engine must leave the GPU first.
            cls.current = None
            cls.current = _Engine(wish)
        assert cls.current is not None
        return cls.current

    def lora(self, folder: Path) -> Any:
        """A request for the adapter in a folder of PEFT's format. vLLM tells adapters apart by their number."""
        from vllm.lora.request import LoRARequest

        self.loras += 1
        return LoRARequest(f"adapter-{self.loras}", self.loras, str(folder))


def check_usable(processes: int) -> None:
    """Raises UserError if vLLM is not installed, or if there is no GPU for it, or several processes."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("score.engine=vllm: vLLM is not installed; run: pip install 'tiedlora[vllm]'")
    if not torch.cuda.is_available():
        raise UserError("score.engine=vllm: needs a GPU, and there is none here; use score.engine=transformers")
    if processes > 1:
        raise UserError("score.engine=vllm: takes one process; start train.py without torchrun")


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    more_ends: Sequence[int] = (),
    batch_size: int,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    adapter: TiedAdapter,
    active: bool,
) -> list[Output]:
    """As decoding.generate, with an engine that loads the base model again from where `model` was loaded.

    vLLM's stop strings would also count among the blanks at the start of an answer. So answers are written to
    their end or to max_new_tokens, and cut afterwards.

    Args:
        batch_size, batch_tokens: are not used, because vLLM decides about batches.
        adapter: the run's adapter, and `active` whether the answers are written with it.

    Raises:
        UserError: the adapter's rank is too large for vLLM.
    """
    from vllm import SamplingParams

    ends = AnswerEnds(tokenizer, stop, max_new_tokens, more_ends)
    longest = max(map(len, prompts)) + max_new_tokens
    engine = _Engine.started(
        _Wish(
            base=model.name_or_path,
            revision=getattr(model.config, "_commit_hash", None),
            dtype=str(model.dtype).removeprefix("torch."),
            longest_row=-(-longest // LENGTH_STEP) * LENGTH_STEP,
            rank=_lora_rank(adapter),
        )
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=max_new_tokens,
        # The ends are those of this project's own decoding, and not what vLLM reads in the model's files.
        ignore_eos=True,
        stop_token_ids=ends.end_ids,
        detokenize=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        lora = None
        if active:
            to_peft(adapter, Path(folder), model.name_or_path)
            lora = engine.lora(Path(folder))
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = engine.llm.generate(inputs, sampling, lora_request=lora, use_tqdm=False)
    progress(len(prompts))
    return [_output(result.outputs[0], ends) for result in results]


def _lora_rank(adapter: TiedAdapter) -> int:
    """The rank to start an engine for. Several targets of one module are stacked, so a pair's rank may be larger."""
    needed = max(len(A) for A, _ in adapter.pairs().values())
    for rank in RANKS:
        if rank >= needed:
            return rank
    raise UserError(f"score.engine=vllm: takes LoRAs of rank {RANKS[-1]} at most, and this one has {needed}")


def _output(completion: Any, ends: AnswerEnds) -> Output:
    tokens = list(completion.token_ids)
    if completion.finish_reason == "stop" and (not tokens or tokens[-1] not in ends.end_ids):
        tokens.append(ends.end_ids[0])
    return ends.first_output(tokens)
