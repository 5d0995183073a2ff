"""The words of a command line, as the commands of argparse read them."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from typing_extensions import override

from tiedlora.errors import UserError, as_called

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser whose help names the commands as this one was called: `tiedlora score` or `scripts/score.py`.

    A mistake is a UserError, because argparse's own message has many lines.
    """

    def __init__(self, documentation: str | None) -> None:
        super().__init__(
            # Not argparse's own choice, which is another one after `python -m tiedlora` in Python 3.14.
            prog=Path(sys.argv[0]).name,
            description=documentation,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    @override
    def format_help(self) -> str:
        return as_called(super().format_help())

    @override
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows what it takes")


def filled(option: str, kind: Callable[[str], T]) -> Callable[[str], T]:
    """The `type=` of a path for argparse. An empty one would be the present folder, or count as not given.

    Args:
        option: as the message names it, such as `--out`.
        kind: what the command gets: str or Path.
    """

    def path(text: str) -> T:
        if not text:
            raise UserError(f"{option}: is empty; give a path, or leave it out (is a variable of the shell not set?)")
        return kind(text)

    return path
