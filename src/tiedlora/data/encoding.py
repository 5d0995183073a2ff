"""From examples to token ids: what fits the model, what is shortened, and what is dropped and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tiedlora.config.schema import TaskConfig
from tiedlora.errors import UserError
from tiedlora.tasks import Example


@dataclass(frozen=True)
class Encoded:
    """One example in tokens. The target ends with the end-of-text token."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


class Encoder:
    """Text to token ids, the same for training and for generation.

    Prompt and target are tokenised apart, so no token merges across their boundary. Training and
    generation leave a prompt the same room, so that one that is shortened is shortened alike in both.

    Args:
        context: tokens that the model can attend to.
    """

    def __init__(self, tokenizer: Any, config: TaskConfig, context: int) -> None:
        self.tokenizer, self.config, self.context = tokenizer, config, context
        self.prompt_limit = min(config.max_prompt_tokens or context, context - config.max_new_tokens)
        """Tokens that a prompt may have."""
        if self.prompt_limit < 1:
            raise UserError(
                f"task.max_new_tokens={config.max_new_tokens}: leaves no room for a prompt in the model's context of "
                f"{context} tokens; lower it"
            )
        if config.chat_template and not tokenizer.chat_template:
            raise UserError("task.chat_template=true: this model's tokenizer has none; set it to false")
        if tokenizer.eos_token_id is None:
            raise UserError("model: its tokenizer has no end-of-text token, which every target ends with")

    def prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, with what the model expects at the start of a text."""
        if self.config.chat_template:
            turn = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        bos = self.tokenizer.bos_token_id
        starts_with_bos = bos is not None and self.tokenizer("x").input_ids[:1] == [bos]
        return (bos, *ids) if starts_with_bos else tuple(ids)

    def continuation(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that goes on after a prompt; a chat template's answer starts without a blank."""
        text = text.lstrip(" ") if self.config.chat_template else text
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def shortened(self, example: Example) -> Example | None:
        """The example itself if its prompt fits, else with what the task lets it lose cut at a word's end.

        Returns:
            None if the task lets it lose nothing, or too little.
        """
        if len(self.prompt(example.prompt)) <= self.prompt_limit:
            return example
        start, end = example.cuttable
        text = example.prompt[start:end]

        def prompt(kept: int) -> str:
            return example.prompt[:start] + _whole_words(text[:kept]) + example.prompt[end:]

        # The longest beginning that fits: more characters never make fewer tokens, but for a word or so.
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self.prompt(prompt(middle))) <= self.prompt_limit:
                low = middle
            else:
                high = middle - 1
        return replace(example, prompt=prompt(low)) if _whole_words(text[:low]) else None

    def example(self, example: Example) -> Encoded:
        """Prompt and target, the latter with the end-of-text token.

        Raises:
            UserError: the prompt has no token, so there is nothing to predict the target's first one from.
        """
        prompt = self.prompt(example.prompt)
        if not prompt:
            raise UserError(f"task.prompt={self.config.prompt!r}: row {example.id} gives an empty prompt")
        return Encoded(prompt, (*self.continuation(example.target), self.tokenizer.eos_token_id))


def _whole_words(text: str) -> str:
    """What is left of a text that was cut anywhere, without the word that the cut may have hit."""
    return text.rpartition(" ")[0].rstrip()


class Fitted(NamedTuple):
    """Rows that fit, in tokens."""

    kept: list[int]
    """Their numbers among the examples."""
    encoded: list[Encoded]
    counts: dict[str, int]
    """How many were shortened, and how many dropped and why, for the record."""


def fit(encoder: Encoder, examples: Sequence[Example]) -> Fitted:
    """Encode the examples to train on, or to take a loss of: shorten what may be, drop and count the rest.

    A target is never cut. `dropped_answer` counts rows whose answer went with the end of a shortened
    prompt: to train on them would be to teach invention.

    Raises:
        UserError: none fits.
    """
    config, context = encoder.config, encoder.context
    kept, encoded = [], []
    counts = {"rows": len(examples), "shortened": 0, "dropped_prompt": 0, "dropped_target": 0, "dropped_answer": 0}
    for number, example in enumerate(examples):
        asked = encoder.shortened(example)
        tokens = encoder.example(asked or example)
        if asked is None:
            counts["dropped_prompt"] += 1
        elif len(tokens.target) > (config.max_target_tokens or context) or len(tokens) > context:
            counts["dropped_target"] += 1
        elif asked is not example and example.must_hold not in asked.prompt:
            counts["dropped_answer"] += 1
        else:
            counts["shortened"] += asked is not example
            kept.append(number)
            encoded.append(tokens)
    if not kept:
        raise UserError(
            f"task={config.name}: none of {len(examples)} rows fits max_prompt_tokens={config.max_prompt_tokens}, "
            f"max_new_tokens={config.max_new_tokens}, max_target_tokens={config.max_target_tokens} and the model's "
            f"context of {context}"
        )
    return Fitted(kept, encoded, counts)
