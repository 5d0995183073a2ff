"""python scripts/score.py RUN --split test: score more of a finished run, without changing what it has (but --again).

RUN is a run's folder. Each kind of scores is a new file, such as RUN/scores/test.answers.jsonl.
`--metrics target_loss` scores only the loss of the split's targets, without generation.
`--drift` adds the divergence from the base model, as score.drift of train.py.
`--forgetting FILE.txt` scores the loss of a text that has nothing to do with the task.
"""

from dataclasses import replace
from pathlib import Path

from tiedlora.commands.parser import Parser, filled
from tiedlora.config import compose
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_run_scores
from tiedlora.records.summary import terminal_lines
from tiedlora.scoring.wanted import lacks_scores, wanted_scores
from tiedlora.tasks import load_task
from tiedlora.tracking.progress import show_log


def main(words: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=filled("RUN", Path), help="the run's folder")
    parser.add_argument("--split", choices=("validation", "test"), help="test, unless --forgetting is given alone")
    parser.add_argument("--metrics", nargs="+", help="as score.metrics= of train.py; all if it is left out")
    parser.add_argument("--drift", action="store_true", help="also the drift from the base model, with the losses")
    parser.add_argument("--forgetting", metavar="FILE.txt", help="neutral text")
    parser.add_argument(
        "--data-root",
        type=filled("--data-root", str),
        help="as data_root= of train.py; default: the run's own, or TIEDLORA_DATA",
    )
    parser.add_argument(
        "--cache",
        type=filled("--cache", str),
        help="default: TIEDLORA_CACHE, or where the run kept it",
    )
    parser.add_argument("--again", action="store_true", help="score again, and replace the files")
    arguments = parser.parse_args(words)
    show_log()
    folder = RunFolder(arguments.run.absolute())
    record = folder.finished_record()
    config = compose.read_finished_config(folder.config_file, record.config.tree)
    config.cache = compose.cache_is_in(config, arguments.cache)
    task = load_task(config.task)
    is_alone = arguments.forgetting and not (arguments.metrics or arguments.drift)
    split = arguments.split or (None if is_alone else "test")
    score = replace(
        config.score,
        splits=[split] if split else [],
        metrics=arguments.metrics,
        forgetting=arguments.forgetting,
        drift=arguments.drift,
        # A run that was scored without its base model gets it so.
        base=config.score.base or arguments.again,
    )
    # A wrong name of a metric is an error, also if nothing is missing.
    wanted_scores(score.metrics, task, score.drift)
    if arguments.again or lacks_scores(score, folder):
        # It imports torch, which takes seconds: --help and a wrong metric do not need it.
        from tiedlora.models.device import here_or_auto
        from tiedlora.runs.add_scores import add_scores

        config.train.device = here_or_auto(config.train.device)
        config.data_root, config.score = compose.rows_are_in(config, arguments.data_root), score
        add_scores(folder, config, arguments.again)
    print(terminal_lines(record, read_run_scores(folder, record), folder.path))
