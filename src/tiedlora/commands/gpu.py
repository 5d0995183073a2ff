"""tiedlora gpu [--rehearse] ...: tests and measurements on a GPU, as `make gpu`."""

import runpy
import sys

from tiedlora.errors import UserError
from tiedlora.places import PROJECT


def main(words: list[str]) -> None:
    if PROJECT is None:
        raise UserError("gpu: runs the tests of a checkout of the project, and this is an installed package; clone it")
    program = PROJECT / "benchmarks" / "gpu.py"
    sys.argv[1:] = words
    # It imports the files beside it.
    sys.path.insert(0, str(program.parent))
    runpy.run_path(str(program), run_name="__main__")
