"""python scripts/export.py RUN --to peft|merged|hub-card [--out FOLDER]: export a finished run for other programs.

    peft       a standard PEFT LoRA folder, exact: PeftModel.from_pretrained, lm-evaluation-harness (peft=), servers
    merged     the base model with the update in its weights, and its tokenizer: AutoModelForCausalLM.from_pretrained
    hub-card   the tied adapter itself, each part once, with its card: tiedlora.load

Every folder has a README.md (a model card). For a task whose answer is a number, peft and merged also have an lm-eval
task that gives the run's score.
"""

from pathlib import Path

from tiedlora.commands.parser import Parser, filled
from tiedlora.config.compose import read_finished_config
from tiedlora.config.schema import SCORED_SPLITS
from tiedlora.errors import UserError
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_run_scores


def main(words: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=filled("RUN", Path), help="the run's folder")
    parser.add_argument("--to", choices=("peft", "merged", "hub-card"), required=True)
    parser.add_argument("--out", type=filled("--out", Path), help="the new folder; default RUN/export/<to>")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of merged weights; default float32")
    parser.add_argument(
        "--split", choices=SCORED_SPLITS, help="whose rows the lm-eval task asks; default: the first that is scored"
    )
    parser.add_argument(
        "--cache",
        type=filled("--cache", str),
        help="where converted models are; default: TIEDLORA_CACHE, or where the run kept them",
    )
    arguments = parser.parse_args(words)
    if arguments.dtype and arguments.to != "merged":
        raise UserError(f"--dtype {arguments.dtype}: is for --to merged; the adapter is always float32")
    if arguments.split and arguments.to == "hub-card":
        raise UserError(f"--split {arguments.split}: is for --to peft or merged, which have an lm-eval task")
    if arguments.cache and arguments.to != "merged":
        raise UserError(f"--cache {arguments.cache}: is for --to merged, which loads the base model")
    run = RunFolder(arguments.run.absolute())
    record = run.finished_record()
    scored = read_run_scores(run, record).splits
    if arguments.split and arguments.split not in scored:
        raise UserError(
            f"--split {arguments.split}: the run has no scores of it; scripts/score.py RUN --split {arguments.split} "
            "makes them"
        )
    out = (arguments.out or run.path / "export" / arguments.to).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; remove it, or choose another folder with --out")
    config = read_finished_config(run.config_file, record.config.tree)

    # Imported here because torch and transformers take seconds, and a wrong argument should be refused before that.
    from tiedlora.export.folder import ExportOptions, export_run

    split = arguments.split or next((name for name in SCORED_SPLITS if name in scored), "validation")
    options = ExportOptions(arguments.to, arguments.dtype or "float32", split, arguments.cache)
    export_run(run, record, config, out, options)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    size = sum(file.stat().st_size for file in files)
    print(f"{record.trainable_params:,} trained parameters, {size / 1e6:.1f} MB in this form")
    print(f"{out}: {', '.join(file.relative_to(out).as_posix() for file in files)}")
