"""The next token of every row of a batch, step by step, with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tiedlora.errors import UserError
from tiedlora.models.placement import input_device
from tiedlora.scoring.batches import PreallocatedLayer, hidden_states, keep_rows, new_cache, padded_left


class Steps(Protocol):
    """Greedy continuations of a batch of prompts."""

    ended_share_to_compact: float
    """Finished rows should leave the batch when they are this share of it."""

    def next_tokens(self) -> Tensor:
        """The most likely next token of each row, (rows,). The next call continues after it."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Continue only these rows: (rows,) their indices in the batch."""
        ...


class GrowingSteps:
    """Every step attends to the tokens so far, so each step has longer keys than the one before.

    Args:
        prompts: token ids, none empty.
        max_new_tokens: the most steps. The cache is allocated once, for the prompts and all steps.
    """

    ended_share_to_compact = 1 / 8
    """To remove rows copies the cache."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int, max_new_tokens: int) -> None:
        self.model = model
        self.ids, self.mask, self.positions = padded_left(prompts, pad_id, input_device(model))
        self.cache = new_cache(model, self.ids.shape[1] + max_new_tokens)

    def next_tokens(self) -> Tensor:
        tokens = _likeliest(self.model, hidden_states(self.model, self.ids, self.mask, self.positions, self.cache))
        self.ids = tokens.unsqueeze(1)
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions[:, -1:] + 1
        return tokens

    def keep(self, rows: Tensor) -> None:
        keep_rows(self.cache, rows)
        self.ids, self.mask, self.positions = self.ids[rows], self.mask[rows], self.positions[rows]


class StaticSteps:
    """Every step after the first has the same shapes and reads the same memory: keys of prompts and all steps, of which
    a mask hides those that are not written yet. So a GPU can record a step once and repeat it (a CUDA graph), which
    saves the time that Python needs to start hundreds of small operations.

    The graph is untried: no GPU was at hand. Without a GPU, the same step runs without it.

    Raises:
        UserError: a layer of the model attends to the last tokens only.
    """

    ended_share_to_compact = 1 / 2
    """A smaller batch needs a graph of its own."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int, max_new_tokens: int) -> None:
        prompt_steps = GrowingSteps(model, prompts, pad_id, max_new_tokens)
        self.model, self.cache = model, prompt_steps.cache
        self.layers = [layer for layer in self.cache.layers if isinstance(layer, PreallocatedLayer)]
        if len(self.layers) < len(self.cache.layers):
            raise UserError(
                "score.engine=static: some layers of this model attend to the last tokens only (a sliding window); "
                "use score.engine=transformers"
            )
        rows, longest = prompt_steps.mask.shape
        hidden_columns = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=prompt_steps.mask.device)
        self.visible = torch.cat([prompt_steps.mask.bool(), hidden_columns], 1)[:, None, None]
        self.first_tokens: Tensor | None = prompt_steps.next_tokens()
        self.tokens = self.first_tokens.clone()
        self.ids, self.positions = prompt_steps.ids.clone(), prompt_steps.positions
        self.column = torch.full((1,), longest, device=self.ids.device)
        for layer in self.layers:
            layer.fix_shapes(self.column)
        self.graph: torch.cuda.CUDAGraph | None = None

    def next_tokens(self) -> Tensor:
        if self.first_tokens is not None:
            tokens, self.first_tokens = self.first_tokens, None
            return tokens
        # What changes from step to step is written into tensors that stay where they are.
        self.visible.index_fill_(3, self.column, True)
        if self.ids.is_cuda:
            self._replay()
        else:
            self.step()
        self.ids.copy_(self.tokens.unsqueeze(1))
        self.positions += 1
        self.column += 1
        return self.tokens.clone()

    def step(self) -> None:
        """One step, from `ids`, `visible`, `positions` and `column` to `tokens`. No value is read from the device."""
        hidden = hidden_states(self.model, self.ids, self.visible, self.positions, self.cache)
        self.tokens.copy_(_likeliest(self.model, hidden))

    def keep(self, rows: Tensor) -> None:
        self.graph = None
        keep_rows(self.cache, rows)
        for layer in self.layers:
            layer.fix_shapes(self.column)
        self.ids, self.visible, self.positions = self.ids[rows], self.visible[rows], self.positions[rows]
        self.tokens = self.tokens[rows]

    def _replay(self) -> None:
        """Run the step as a CUDA graph, which is recorded first if there is none for this batch."""
        if self.graph is None:
            # A first run outside of the graph lets libraries allocate what they need. It writes what the graph writes.
            device = self.ids.device
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self.step()
            torch.cuda.current_stream(device).wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # By name: torch keeps the stream of its first recording, which may belong to another GPU.
            with torch.cuda.graph(self.graph, stream=stream):
                self.step()
        self.graph.replay()


def _likeliest(model: Any, hidden: Tensor) -> Tensor:
    """The most likely next token of each row. The output head is computed at only one position of each row."""
    logits: Tensor = model.get_output_embeddings()(hidden[:, -1])
    return logits.argmax(-1)
