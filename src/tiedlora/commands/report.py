"""python scripts/report.py outputs --out report: finished runs -> tables, intervals, figures, claims, one page.

It reads only run folders, and needs no torch, no W&B account and no network. docs/results.md explains every column and
interval.
"""

from pathlib import Path

from tiedlora import screen
from tiedlora.commands.parser import Parser, filled
from tiedlora.errors import UserError
from tiedlora.page import readme, terminal, write
from tiedlora.places import CLAIMS


def main(words: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=filled("RUNS", Path), help="folders of runs (outputs/), or single runs' folders"
    )
    parser.add_argument(
        "--out", type=filled("--out", Path), default=Path("report"), help="where the report goes; default report/"
    )
    parser.add_argument(
        "--claims",
        type=filled("--claims", Path),
        help="a claims file; default: that of a study, or claims/tied_lora.yaml",
    )
    parser.add_argument("--split", choices=("validation", "test"), help="default: test where the chosen runs have it")
    parser.add_argument(
        "--readme",
        type=filled("--readme", Path),
        help="also write tables between the marks of this file (docs/results.md)",
    )
    parser.add_argument("--all", action="store_true", help="print every claim with its reason, every arm and folder")
    arguments = parser.parse_args(words)
    if arguments.readme:
        readme.check(arguments.readme)
    of_study = [folder / "claims.yaml" for folder in arguments.runs if (folder / "claims.yaml").is_file()]
    if len({path.read_bytes() for path in of_study}) > 1 and not arguments.claims:
        raise UserError(f"--claims: {' and '.join(map(str, of_study))} differ; name the file to use")
    report = write.build(arguments.runs, claims=arguments.claims or (*of_study, CLAIMS)[0], split=arguments.split)
    if not report.runs and all(folder.run is None for folder in report.left_out):
        found = "".join(f" ({folder.path.name}: {folder.reason})" for folder in report.left_out[:1])
        where = " and ".join(map(str, arguments.runs))
        raise UserError(f"{where}: no run is there{found}; give the folder with the runs (outputs= of train.py)")
    write.write(report, arguments.out)
    screen.show(*terminal.parts(report, arguments.out, everything=arguments.all))
    if arguments.readme:
        print(f"wrote {', '.join(readme.write(report, arguments.readme))} into {arguments.readme}")
