"""python scripts/verify.py RUN: does a finished run agree with its record, and can its numbers be reproduced?

It checks the configuration, and the data, the adapter and the base model by their hashes. It computes the metrics of
each file of scores from its rows, and scores a sample of the rows again with the adapter. Exit code 0: everything that
was checked agrees; 3: something does not agree.
"""

from pathlib import Path

from tiedlora import errors
from tiedlora.commands.parser import Parser, filled
from tiedlora.errors import UserError
from tiedlora.tracking.progress import show_log


def main(words: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=filled("RUN", Path), help="the run's folder")
    parser.add_argument(
        "--data-root",
        type=filled("--data-root", str),
        help="as data_root= of train.py; default: the run's own, or TIEDLORA_DATA",
    )
    parser.add_argument("--rows", type=int, default=32, help="rows of each file to score again, at least; 0: none")
    parser.add_argument(
        "--cache", type=filled("--cache", Path), help="default: TIEDLORA_CACHE, or where the run kept it"
    )
    arguments = parser.parse_args(words)
    if arguments.rows < 0:
        raise UserError(f"--rows {arguments.rows}: must be at least 0")
    show_log()
    # It imports torch, which takes seconds: --help does not need it.
    from tiedlora.runs import verify

    findings = verify.verify(arguments.run, data_root=arguments.data_root, rows=arguments.rows, cache=arguments.cache)
    for line in verify.lines(findings):
        print(line)
    if any(finding.ok is False for finding in findings):
        raise SystemExit(errors.DISAGREES)
