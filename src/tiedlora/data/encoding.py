"""From examples to token ids. Prompts that do not fit are shortened, or their rows are dropped and counted.

The token ids of many rows are kept on disk, because to encode them takes longer than the first steps of training. The
name of a file is a hash of everything that its token ids depend on.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from tiedlora import storage
from tiedlora.config.identity import identity
from tiedlora.config.schema import TaskConfig
from tiedlora.description import BaseModelRecord
from tiedlora.errors import UserError, is_out_of_memory
from tiedlora.reading import plain
from tiedlora.records.provenance import CHAT_TEMPLATE, LEFT_OUT, TARGET_BLANK, TOKENIZER
from tiedlora.tasks import Example

BLANK_MARK = "\u2581"
"""How SentencePiece writes a blank in a token."""
ENCODING_VERSION = 3
"""Raise it when encode_rows gives other token ids for the same rows, or refuses others."""
DATE = "26 Jul 2024"
"""What a chat template that asks for the date gets: runs of different days have the same prompts. Llama 3.2's date."""
ONE_DATE = "{%- macro strftime_now(form) -%}" + DATE + "{%- endmacro %}{{ '' }}"
"""Put before a chat template that asks for the date."""
THINKING = "enable_thinking"
"""The name in the chat templates of Qwen3, SmolLM3 and others that think by default."""
MIN_ROWS = 1000
"""Fewer rows are not stored, because encoding them is faster than reading a file."""
COUNTS = ("rows", "shortened", "dropped_prompt", "dropped_target", "dropped_answer")
"""What is counted of rows (see DataRecord)."""


@dataclass(frozen=True)
class Encoded:
    """One example as token ids. The target ends with the end-of-text token."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


class WrongTemplate(UserError):
    """The chat template ended with an error."""


class Encoder:
    """Text to token ids, the same for training and for generation.

    Prompt and target are tokenised separately, so no token crosses the boundary between them. The limit on a prompt's
    tokens is the same in training and in generation, so both shorten a prompt in the same way.

    Args:
        context: how many tokens the model can attend to.
        more_ends: the tokens that end an answer, besides the tokenizer's end-of-text token (BaseModel.more_ends).

    Raises:
        UserError: the task does not fit the tokenizer, or no prompt can fit.
    """

    def __init__(self, tokenizer: Any, config: TaskConfig, context: int, more_ends: Sequence[int] = ()) -> None:
        self.tokenizer, self.config, self.context = tokenizer, config, context
        # Answers are decoded without special tokens, so a stop string that is one is found by its id.
        added = tokenizer.added_tokens_decoder.items()
        self.more_ends = (*more_ends, *(id for id, token in added if token.special and token.content in config.stop))
        self.prompt_limit = min(config.max_prompt_tokens or context, context - config.max_new_tokens)
        """The most tokens that a prompt may have."""
        if self.prompt_limit < 1:
            raise UserError(
                f"task.max_new_tokens={config.max_new_tokens}: leaves no room for a prompt in the model's context of "
                f"{context} tokens; lower it"
            )
        if config.chat_template and not tokenizer.chat_template:
            raise UserError("task.chat_template=true: this model's tokenizer has no chat template; set it to false")
        template = str(tokenizer.chat_template)
        if unknown := next((name for name in config.template_options if name not in template), None):
            raise UserError(
                f"task.template_options.{unknown}: this model's chat template has no such name; correct it, or leave "
                "it out"
            )
        if tokenizer.eos_token_id is None:
            raise UserError("model: its tokenizer has no end-of-text token, which every target ends with")

    @property
    def template_digest(self) -> str | None:
        """The first characters of the chat template's sha256; None for a task without a template.

        A model's folder may have the template in a file of its own, which the model's digest does not cover.
        """
        if not self.config.chat_template:
            return None
        return storage.json_sha256(self._dated_template or self.tokenizer.chat_template)[:16]

    @cached_property
    def _dated_template(self) -> str | None:
        """The chat template with ONE_DATE; None if it asks for no date."""
        template = self.tokenizer.chat_template
        return ONE_DATE + template if isinstance(template, str) and "strftime_now" in template else None

    @cached_property
    def tokenizer_digest(self) -> str | None:
        """The first characters of the sha256 of the rules that make tokens; None for a model that is not in a folder.

        A folder may have them in files that the model's digest does not cover, such as merges.txt. Of a tokenizer
        without a backend, only the vocabulary counts.
        """
        if not (name := self.tokenizer.name_or_path) or not Path(name).is_dir():
            return None
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = self.tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
        # A call of the tokenizer may change these two.
        rules |= {"truncation": None, "padding": None}
        text = json.dumps([rules, self.tokenizer.special_tokens_map], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, with the chat template, or with the token that the model expects at a text's start.

        A prompt of chat messages is their JSON.
        """
        if self.config.chat_template:
            turn = [{"role": "user", "content": text}] if self.config.messages is None else json.loads(text)
            return tuple(self.tokenizer(self._rendered(turn, True), add_special_tokens=False).input_ids)
        return self.text(text)

    def _rendered(self, turns: list[dict[str, str]], asks: bool) -> str:
        """The text of chat messages by the template; with `asks`, also the beginning of the assistant's next one."""
        options: dict[str, Any] = {
            "chat_template": self._dated_template,
            "add_generation_prompt": asks,
            "tokenize": False,
        }
        options |= self.config.template_options
        try:
            return str(self.tokenizer.apply_chat_template(turns, **options))
        except Exception as error:  # a template is a program, and may end with any error
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            advice = (
                "mend it in the model's folder, or set task.chat_template=false"
                if self.config.messages is None
                else "change or remove the row, or take a model whose template takes such messages"
            )
            raise WrongTemplate(
                f"task.chat_template=true: the chat template of this model cannot be used ({reason}); {advice}"
            ) from None

    def may_think(self) -> bool:
        """Whether the chat template can switch thinking before an answer on and off, and no option has done so."""
        switches = self.config.chat_template and THINKING in str(self.tokenizer.chat_template)
        return switches and THINKING not in self.config.template_options

    def other_turn_end(self) -> str | None:
        """The token with which the chat template ends an answer, if it is another than the one that is trained."""
        if not self.config.chat_template:
            return None
        answer = "answer"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        after = ""
        # A template may be for prompts alone. One that is wrong is named with the first row.
        with suppress(WrongTemplate):
            after = self._rendered(turns, False).rpartition(answer)[2]
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        ends = [id for id in self.tokenizer(after, add_special_tokens=False).input_ids if id in special]
        return self.tokenizer.decode(ends[0]) if ends and ends[0] != self.tokenizer.eos_token_id else None

    def text(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that starts a sequence, with the token that the model expects there, and no template."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        bos = self.tokenizer.bos_token_id
        starts_with_bos = bos is not None and self.tokenizer("x").input_ids[:1] == [bos]
        return (bos, *ids) if starts_with_bos else tuple(ids)

    @property
    def versions(self) -> dict[str, str]:
        """What a record and the keys of caches hold about the tokens, besides the model's digest; mostly nothing."""
        found = {CHAT_TEMPLATE: self.template_digest, TARGET_BLANK: LEFT_OUT if self.leaves_out_blank else None}
        found[TOKENIZER] = self.tokenizer_digest
        return {name: value for name, value in found.items() if value is not None}

    @cached_property
    def leaves_out_blank(self) -> bool:
        """Whether a target loses its leading blank, because the tokenizer puts one before every text.

        The files of Mistral and Phi-3 tell it to. A text that begins with a blank then begins with two, but prompt and
        target as one text would have one there. A chat template takes the leading blanks off in any case.
        """
        if self.config.chat_template:
            return False
        alone, with_blank = (self.tokenizer(text, add_special_tokens=False).input_ids for text in ("x", " x"))
        first = self.tokenizer.convert_ids_to_tokens(alone[:1]) if alone else []
        return bool(first) and str(first[0]).startswith(BLANK_MARK) and alone != with_blank

    def continuation(self, text: str) -> tuple[int, ...]:
        """Token ids after a prompt. A chat template takes off all leading blanks, `leaves_out_blank` only one.

        Where the tokenizer puts a blank before every text, one that begins without is encoded behind a line feed.
        """
        if self.config.chat_template:
            text = text.lstrip(" ")
        elif self.leaves_out_blank and not text.startswith(" "):
            line, both = (self.tokenizer(part, add_special_tokens=False).input_ids for part in ("\n", f"\n{text}"))
            return tuple(both[len(line) :])
        elif self.leaves_out_blank:
            text = text.removeprefix(" ")
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def scored(self, example: Example, split: str = "") -> Example:
        """The example as it is scored: its prompt is shortened if needed, so that the answer fits.

        Args:
            split: that of the example, for the message.

        Raises:
            UserError: it does not fit. No example may be left out.
        """
        task, shortened = self.config, self.shortened(example)
        answer_tokens = max([task.max_new_tokens, *(len(self.continuation(choice)) for choice in example.choices)])
        if shortened is not None and len(self.prompt(shortened.prompt)) + answer_tokens <= self.context:
            return shortened
        limit = min(self.prompt_limit, self.context - answer_tokens)
        why = f"model.context={self.context} less {answer_tokens} for the answer"
        advice = "lower task.max_new_tokens, or take a model of longer context"
        if limit == task.max_prompt_tokens:
            why, advice = f"task.max_prompt_tokens={limit}", "raise task.max_prompt_tokens"
        raise UserError(
            f"task={task.name}: row {example.id}{f' of {split}' if split else ''} has a prompt of "
            f"{len(self.prompt(example.prompt))} tokens that cannot be shortened to {limit} ({why}); {advice}"
        )

    def cuts_answer(self, example: Example) -> bool:
        """Whether an answer that equals the target would be cut off."""
        return len(self.continuation(example.target)) > self.config.max_new_tokens

    def shortened(self, example: Example) -> Example | None:
        """The example itself if its prompt fits. Otherwise its `cuttable` text is shortened, at the end of a word.

        Returns:
            None if the example has no such text, or if nothing of the text would be left.

        Raises:
            UserError: the chat template does not take the prompt.
        """
        try:
            if self._fits(example):
                return example
        except WrongTemplate as error:
            raise UserError(f"{error} (row {example.id})") from None
        start, end = example.cuttable
        # Where the rest of the prompt alone does not fit, the bisection would find nothing. It would tokenise the whole
        # prompt a dozen times, which takes minutes for a question of a million characters.
        if start == end or not self._fits(_cut(example, 0)):
            return None
        # Bisection finds the most characters that fit: nearly always, a longer text has more tokens.
        lengths = range(end - start, 0, -1)
        left_out = bisect.bisect_left(lengths, True, key=lambda length: self._fits(_cut(example, length)))
        most = end - start - left_out
        return _cut(example, most) if _whole_words(example.prompt[start : start + most]) else None

    def _fits(self, example: Example) -> bool:
        return len(self.prompt(example.prompt)) <= self.prompt_limit

    def example(self, example: Example) -> Encoded:
        """The token ids of prompt and target. The target ends with the end-of-text token.

        Raises:
            UserError: the prompt has no tokens (the model predicts a target's first token from the token before it), or
                the target holds a token that ends an answer.
        """
        prompt = self.prompt(example.prompt)
        if not prompt:
            raise UserError(f"task.prompt={self.config.prompt!r}: row {example.id} gives an empty prompt")
        target = self.continuation(example.target)
        ends = {self.tokenizer.eos_token_id, *self.more_ends}
        last = next((place for place in range(len(target), 0, -1) if target[place - 1] not in ends), 0)
        early = next((token for token in target[:last] if token in ends), None)
        if early is not None:
            # The model would learn to end there, and no answer could equal the target.
            raise UserError(
                f"task={self.config.name}: the target of row {example.id} holds {self.tokenizer.decode(early)!r}, "
                "which is a token that ends an answer; take it out of the text, or leave the row out"
            )
        return Encoded(prompt, (*target, self.tokenizer.eos_token_id))


def _cut(example: Example, length: int) -> Example:
    """The example with at most `length` characters of its cuttable text, in whole words."""
    start, end = example.cuttable
    kept = _whole_words(example.prompt[start : min(start + length, end)])
    return replace(example, prompt=example.prompt[:start] + kept + example.prompt[end:])


def _whole_words(text: str) -> str:
    """A text that was cut at any character, without its last word, which may be incomplete."""
    return text.rpartition(" ")[0].rstrip()


class EncodedRows(NamedTuple):
    """The rows that fit, as token ids, and the counts of the others."""

    kept: list[int]
    """The index of each row among the examples."""
    encoded: list[Encoded]
    counts: dict[str, int]
    """How many rows there were, how many were shortened, and how many were dropped for each reason (see DataRecord)."""


def encode_rows(encoder: Encoder, examples: Sequence[Example]) -> EncodedRows:
    """Encode the examples of training or of a validation loss.

    Prompts are shortened where the task allows it, and rows that do not fit are dropped and counted. A target is never
    cut. `dropped_answer` counts rows whose answer was in the text that shortening removed. To train on them would teach
    the model to invent answers.

    Raises:
        UserError: no row fits.
    """
    config, context = encoder.config, encoder.context
    kept, encoded = [], []
    counts = dict.fromkeys(COUNTS, 0) | {"rows": len(examples)}
    for number, example in enumerate(examples):
        shortened = encoder.shortened(example)
        if shortened is None:
            counts["dropped_prompt"] += 1
            continue
        tokens = encoder.example(shortened)
        if len(tokens.target) > (config.max_target_tokens or context) or len(tokens) > context:
            counts["dropped_target"] += 1
        elif shortened is not example and example.must_hold not in shortened.prompt:
            counts["dropped_answer"] += 1
        else:
            counts["shortened"] += shortened is not example
            kept.append(number)
            encoded.append(tokens)
    if not kept:
        limits = {key: getattr(config, key) for key in ("max_prompt_tokens", "max_new_tokens", "max_target_tokens")}
        said = ", ".join(f"{key}={'null' if limit is None else limit}" for key, limit in limits.items())
        raise UserError(
            f"task={config.name}: none of {len(examples)} rows fits {said} and the model's context of {context}"
        )
    return EncodedRows(kept, encoded, counts)


def load_or_encode(
    encoder: Encoder, examples: Sequence[Example], digest: str, base: BaseModelRecord | None, cache: Path
) -> EncodedRows:
    """As encode_rows, but many rows are read from a file of the cache, or encoded and written to it.

    Args:
        digest: the digest of the examples.
        base: the base model; None if its digest does not identify it, so that nothing is kept. The encoder's versions
            have what its digest does not cover.
        cache: the folder `config.cache`.

    Raises:
        UserError: as encode_rows.
    """
    if len(examples) < MIN_ROWS or base is None:
        return encode_rows(encoder, examples)
    # A tokenizer of the hub has no digest, and transformers may convert it in another way.
    key = [ENCODING_VERSION, tokenizers.__version__, version("transformers"), *encoder.versions.values()]
    key += [identity(encoder.config), encoder.context, digest]
    path = cache / "tokens" / f"{storage.json_sha256([*key, plain(base)])[:24]}.int32"
    with suppress(OSError, ValueError):
        return _from_bytes(path.read_bytes())
    # The file is missing or damaged. Everything in it can be computed.
    rows = encode_rows(encoder, examples)
    # The cache may be read-only or full: then they are computed again next time.
    with suppress(OSError):
        storage.write_bytes(path, _to_bytes(rows))
    return rows


def _to_bytes(rows: EncodedRows) -> bytes:
    """A checksum, then the counts, the rows' numbers, the lengths of their prompts and targets, and all token ids."""
    lengths = [len(part) for row in rows.encoded for part in (row.prompt, row.target)]
    ids = [token for row in rows.encoded for token in (*row.prompt, *row.target)]
    data = np.array([*rows.counts.values(), len(rows.kept), *rows.kept, *lengths, *ids], dtype=np.int32).tobytes()
    return hashlib.sha256(data).digest() + data


def _from_bytes(data: bytes) -> EncodedRows:
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise ValueError("damaged")
    numbers = iter(np.frombuffer(data[32:], dtype=np.int32).tolist())
    counts = dict(zip(COUNTS, islice(numbers, len(COUNTS)), strict=True))
    kept = list(islice(numbers, next(numbers)))
    lengths = iter(list(islice(numbers, 2 * len(kept))))
    encoded = [Encoded(tuple(islice(numbers, next(lengths))), tuple(islice(numbers, next(lengths)))) for _ in kept]
    return EncodedRows(kept, encoded, counts)
