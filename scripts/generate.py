"""python scripts/generate.py RUN [--prompt TEXT ...]: try a finished run, base and adapted model side by side.

Without --prompt it asks for one after the other; an empty line ends it. A prompt is put in the task's template where
that has one field (so type a question, not "Question: ..."); --raw takes it as it is.
"""

import argparse
import os
import re
import shutil
import textwrap
from itertools import zip_longest
from pathlib import Path

from tiedlora import errors
from tiedlora import text as present
from tiedlora.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--raw", action="store_true", help="do not use the task's template")
    parser.add_argument("--max-new-tokens", type=int, help="default: the task's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", default=os.environ.get("TIEDLORA_CACHE"), help="default: where the run kept it")
    arguments = parser.parse_args()

    from tiedlora.data.encoding import Encoder
    from tiedlora.runs import library
    from tiedlora.scoring.decoding import generate

    config = library.config_of(arguments.run)
    base = library.base_of(arguments.run, device=arguments.device, cache=arguments.cache)
    attached = library.load(arguments.run, base.model)
    encoder = Encoder(base.tokenizer, config.task, config.model.context)
    names = re.findall(r"\{(\w+)\}", config.task.prompt)

    new_tokens = config.task.max_new_tokens if arguments.max_new_tokens is None else arguments.max_new_tokens
    if new_tokens < 1:
        raise UserError(f"--max-new-tokens {new_tokens}: must be at least 1")

    def answer(prompt: str) -> str:
        ids = encoder.prompt(prompt)
        if not ids or len(ids) + new_tokens > config.model.context:
            raise UserError(
                f"--prompt: has {len(ids)} tokens; it needs at least one and, with {new_tokens} new ones, at most the "
                f"model's {config.model.context}"
            )
        (output,) = generate(
            base.model,
            base.tokenizer,
            [ids],
            max_new_tokens=new_tokens,
            stop=config.task.stop,
            batch_size=1,
        )
        return output.text

    def show(text: str) -> None:
        prompt = text if arguments.raw or len(names) != 1 else config.task.prompt.replace(f"{{{names[0]}}}", text)
        adapted = answer(prompt)
        attached.disable()
        plain = answer(prompt)
        attached.enable()
        print(present.lines(prompt), side_by_side(plain, adapted), "", sep="\n")

    for prompt in arguments.prompt:
        show(prompt)
    while not arguments.prompt:
        try:
            text = input(f"{names[0] if len(names) == 1 and not arguments.raw else 'prompt'}> ")
        except EOFError:
            break
        if not text.strip():
            break
        show(text)


def side_by_side(base: str, adapted: str) -> str:
    """Two columns of the terminal's width, each text's own lines kept."""
    width = max(20, (shutil.get_terminal_size((100, 24)).columns - 3) // 2)
    columns = []
    for title, text in (("base", base), ("adapted", adapted)):
        # Whatever a model says must not move the cursor.
        shown = ["".join(c if c.isprintable() else " " for c in line) for line in text.splitlines()]
        lines = [part for line in shown for part in textwrap.wrap(line, width) or [""]]
        columns.append([title, "-" * width, *lines])
    return "\n".join(f"{left:<{width}} | {right}".rstrip() for left, right in zip_longest(*columns, fillvalue=""))


if __name__ == "__main__":
    with errors.exit_codes():
        main()
