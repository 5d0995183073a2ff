"""The words of a command line, as the commands of argparse read them."""

import argparse
import sys
from pathlib import Path

from tiedlora.errors import as_called


class Parser(argparse.ArgumentParser):
    """A parser whose help names the commands as this one was called: `tiedlora score` or `scripts/score.py`."""

    def __init__(self, documentation: str | None) -> None:
        super().__init__(
            # Not argparse's own choice, which is another one after `python -m tiedlora` in Python 3.14.
            prog=Path(sys.argv[0]).name,
            description=documentation,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def format_help(self) -> str:
        """The help, with the command as it was called."""
        return as_called(super().format_help())
