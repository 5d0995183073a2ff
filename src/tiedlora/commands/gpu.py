"""tiedlora gpu [--rehearse] ...: tests and measurements on a GPU, as `make gpu`."""

import runpy
import sys

from tiedlora.config.project import PROJECT
from tiedlora.errors import UserError


def main(words: list[str]) -> None:
    program = PROJECT / "benchmarks" / "gpu.py"
    if not program.is_file():
        raise UserError("gpu: runs the tests of a checkout of the project, and this is an installed package; clone it")
    sys.argv[1:] = words
    # It imports the files beside it.
    sys.path.insert(0, str(program.parent))
    runpy.run_path(str(program), run_name="__main__")
