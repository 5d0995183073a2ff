"""python scripts/score.py RUN --split test: add a split to a finished run, without changing its identity.

RUN is a run's folder. The split's predictions go to RUN/predictions/, its scores into RUN/result.json.
"""

import argparse
import logging
import os
from pathlib import Path

from tiedlora import cli
from tiedlora import text as present
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--data-root", default=os.environ.get("TIEDLORA_DATA"), help="as data_root= of train.py")
    parser.add_argument("--again", action="store_true", help="score a split that was scored before")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("tiedlora").setLevel(logging.INFO)
    folder = RunFolder(arguments.run.absolute())
    result = folder.result()
    if result is None or arguments.again or arguments.split not in result["scores"]:
        result = run.score_more(folder, [arguments.split], data_root=arguments.data_root)
    print(present.result(result, folder.path))


if __name__ == "__main__":
    with cli.exits():
        main()
