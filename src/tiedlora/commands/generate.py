"""python scripts/generate.py RUN [--prompt TEXT ...]: try a finished run, with base and adapted model side by side.

Without --prompt, it asks for prompts one after the other; an empty line ends it. If the task's template has one field,
the prompt is put into this field (so type a question, not "Question: ..."). --raw leaves the task's template out; a
chat template stays.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from tiedlora.commands.parser import Parser, filled
from tiedlora.config.identity import adapter_folder
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.tasks.base import fields_of, render
from tiedlora.tasks.rows import DataRow
from tiedlora.text import visible, visible_lines
from tiedlora.tracking.progress import running_clock

if TYPE_CHECKING:
    from tiedlora.adapter.arms import Arm
    from tiedlora.data.encoding import Encoder

NO_UTF8 = "has bytes that are no UTF-8; give the text in UTF-8"


def main(words: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=filled("RUN", Path), help="the run's folder")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--raw", action="store_true", help="do not use the task's template")
    parser.add_argument("--max-new-tokens", type=int, help="default: the task's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:NUMBER; default auto")
    parser.add_argument(
        "--cache",
        type=filled("--cache", str),
        help="default: TIEDLORA_CACHE, or where the run kept it",
    )
    arguments = parser.parse_args(words)
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: must be at least 1")
    for text in arguments.prompt:
        check_utf8("--prompt", text)

    # Imported here because torch and transformers take seconds: --help and a wrong argument do not need them.
    with running_clock("importing torch"):
        from tiedlora.data.encoding import Encoder
        from tiedlora.models import products
        from tiedlora.models.device import resolve_device
        from tiedlora.runs import library

    config = library.config_of(arguments.run)
    # A run without an adapter is an error before its base is loaded, and perhaps converted.
    adapter_folder(arguments.run)
    with running_clock(f"loading {config.model.name}"):
        base = library.base_of(arguments.run, device=arguments.device, cache=arguments.cache)
    arm = library.load(arguments.run, base)
    encoder = Encoder(base.tokenizer, config.task, config.model.context, base.more_ends)
    max_new_tokens = arguments.max_new_tokens or config.task.max_new_tokens
    fields = [] if arguments.raw else fields_of(config.task.prompt)
    field = fields[0] if len(fields) == 1 else None
    for text in arguments.prompt or typed_prompts(field or "prompt"):
        prompt = text if field is None else render(config.task.prompt, DataRow("--prompt", {field: text}))
        with products.on_any_cpu(resolve_device(arguments.device), config.train.dtype):
            base_answer, adapted_answer = answers(arm, encoder, config, prompt, max_new_tokens)
        print(visible_lines(prompt), side_by_side(base_answer, adapted_answer), "", sep="\n")


def answers(arm: Arm, encoder: Encoder, config: Config, prompt: str, max_new_tokens: int) -> tuple[str, str]:
    """(the base model's answer, the adapted model's answer).

    Raises:
        UserError: the prompt does not fit into the model's context.
    """
    from tiedlora.scoring.decoding import AnswerEnds, decode  # as in main

    if config.task.messages is not None:
        prompt = json.dumps([{"role": "user", "content": prompt}])
    ids, context = encoder.prompt(prompt), config.model.context
    if not ids or len(ids) + max_new_tokens > context:
        raise UserError(
            f"--prompt: has {len(ids)} tokens; it needs at least one and, with {max_new_tokens} new ones, at most the "
            f"model's {context}"
        )
    ends = AnswerEnds(encoder.tokenizer, config.task.stop, max_new_tokens, encoder.more_ends)
    (adapted,) = decode(arm.model, [ids], ends)
    arm.disable()
    (base,) = decode(arm.model, [ids], ends)
    arm.enable()
    return base.text, adapted.text


def typed_prompts(field: str) -> Iterator[str]:
    """The lines that the user types, until an empty line or the end of the input.

    Raises:
        UserError: a line is not UTF-8.
    """
    if sys.stdin.isatty():
        print("An empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input(f"{field}> ")
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError(f"standard input: {NO_UTF8}") from None
        check_utf8("standard input", text)
        if not text.strip():
            return
        yield text


def check_utf8(source: str, text: str) -> None:
    """Refuse a text of a person with bytes that are no UTF-8. Python has them as halves of surrogate pairs.

    Args:
        source: where the text comes from.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{source}: {NO_UTF8}") from None


def side_by_side(base: str, adapted: str) -> str:
    """Two texts as columns that fill the terminal. Each text keeps its lines, and cannot move the cursor."""
    width = max(20, (shutil.get_terminal_size((100, 24)).columns - 3) // 2)
    columns = []
    for title, text in (("base", base), ("adapted", adapted)):
        lines = [part for line in text.splitlines() for part in textwrap.wrap(visible(line), width) or [""]]
        columns.append([title, "-" * width, *lines])
    return "\n".join(f"{left:<{width}} | {right}".rstrip() for left, right in zip_longest(*columns, fillvalue=""))
