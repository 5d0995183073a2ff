"""python scripts/compare.py A B: is B better than A, and how sure?

A and B are two runs (their folders), two files of predictions, or two outputs of lm-evaluation-harness (--log_samples).
Several seeds of each: --a RUN RUN RUN --b RUN RUN RUN. Rows are paired by their ids or by the hash of the document, so
both must be scored on the same rows. A file has one row a line, such as {"id": 1, "correct": true}.

It needs no torch, no account and no network. docs/compare.md explains every number.
"""

from pathlib import Path

from tiedlora.analysis.two_sides import compare_sides, left_out, read_side
from tiedlora.commands.parser import Parser, filled
from tiedlora.errors import UserError
from tiedlora.page.compared import Compared


def main(words: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("sides", nargs="*", metavar="A B", type=filled("A B", Path), help="the two that are compared")
    for name in ("a", "b"):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            metavar=name.upper(),
            type=filled(f"--{name}", Path),
            default=[],
            help=f"in place of {name.upper()}: one for each seed, or each task",
        )
    parser.add_argument("--metric", nargs="+", default=[], help="default: the first one of each task")
    parser.add_argument("--split", choices=("validation", "test"), help="of runs; default: test where all have it")
    parser.add_argument(
        "--cluster", metavar="FIELD", help="the field that names what rows belong together, such as an article"
    )
    parser.add_argument(
        "--lower-is-better", action="store_true", help="the metrics of these files are errors or losses"
    )
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="default text")
    arguments = parser.parse_args(words)
    sides = (arguments.a, arguments.b) if arguments.a or arguments.b else [[path] for path in arguments.sides]
    if len(sides) != 2 or not all(sides) or (arguments.sides and (arguments.a or arguments.b)):
        raise UserError("compare: takes two, A B; with several seeds or tasks: --a A1 A2 --b B1 B2")
    a, b = (read_side(name, paths, arguments.cluster) for name, paths in zip("AB", sides, strict=True))
    tests = compare_sides(a, b, arguments.metric, arguments.split, arguments.lower_is_better)
    compared = Compared(a, b, tests, left_out(a, b))
    print({"text": compared.text, "markdown": compared.markdown, "json": compared.json}[arguments.format](), end="")
