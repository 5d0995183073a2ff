"""A model card: what an exported adapter is, what it was trained on, how it scored, and the command that made it."""

from __future__ import annotations

import json
from typing import Any

from tiedlora import tying
from tiedlora.config import command
from tiedlora.config.schema import Config
from tiedlora.text import visible

_USE = {
    "peft": """    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "FOLDER")""",
    "merged": """    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("FOLDER")""",
    "tied": """    import tiedlora
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("{base}")
    attached = tiedlora.load("FOLDER", model)""",
}


def card(result: dict[str, Any], config: Config, kind: str, notes: list[str]) -> str:
    """The text of README.md for an exported folder.

    Args:
        result: a finished run's result.json.
        kind: what the folder holds: `peft`, `merged` or `tied`.
        notes: sentences about this very export, such as what rounding did.
    """
    base, label = result["base"], tying.label(config.tying)
    front = {
        "base_model": base["name"],
        "library_name": {"peft": "peft", "merged": "transformers", "tied": "tiedlora"}[kind],
        "pipeline_tag": "text-generation",
        "tags": ["tied-lora", "lora", "arxiv:2311.09578"],
    }
    share = f"{result['trainable_params']:,} ({100 * result['share_of_lora']:.2f} % of LoRA's at this rank)"
    facts = {
        "base model": f"`{base['name']}`, revision `{base['revision']}`, `{base['digest']}`",
        "configuration": f"{label}, r = {config.rank.r}, alpha = {config.rank.alpha:g}, targets {config.tying.targets}",
        "trainable parameters": share,
        "task": f"{config.task.name} (version {config.task.version}), {result['data']['train']['rows']} training rows, "
        f"sha256 `{result['data']['train']['digest'][:16]}`",
        "training": f"{result['training']['steps']} steps of {config.train.batch_size} rows, lr {config.train.lr:g}, "
        f"base in {config.train.dtype}, validation loss {result['training']['validation_loss_first']:.3f} -> "
        f"{result['training']['validation_loss_last']:.3f}",
        "seed": str(result["seed"]),
        "made with": f"commit `{result['code']['commit']}`{' with changes' if result['code']['dirty'] else ''}",
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "device": result["device"],
    }
    if result["code"]["commit"] is None:
        del facts["made with"]
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        f"# {label}, r = {config.rank.r}, on {config.task.name}",
        "",
        "A Tied-LoRA adapter (arXiv 2311.09578) trained with the tiedlora research harness.",
        *(["", *notes] if notes else []),
        "",
        "## Use",
        "",
        _USE[kind].format(base=base["name"]),
        "",
        f"Prompt, as it was trained: `{_prompt(config.task.prompt)}`",
        "",
        "## Facts",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {_cell(value)} |" for key, value in facts.items()),
        "",
        "## Scores",
        "",
        *_scores(result),
        "",
        "## Command",
        "",
        f"    {command.command(config)}",
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A record's words in a table's cell: they end neither the cell nor the line, and are no HTML."""
    return visible(text).replace("|", "\\|").replace("<", "&lt;")


def _prompt(text: str) -> str:
    """A template as JSON that a backtick in it does not end."""
    return visible(json.dumps(text, ensure_ascii=False).replace("`", "\\u0060"))


def _scores(result: dict[str, Any]) -> list[str]:
    lines = [
        "95 % intervals over which rows were drawn; one seed, so they say nothing of another.",
        "",
        "| split | metric | rows | base | adapted |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for split, scores in result["scores"].items():
        for name, found in scores["metrics"].items():
            base = scores.get("base", {}).get(name)
            lines.append(
                f"| {split} | {name} | {scores['rows']} | {_interval(base) if base else ''} | {_interval(found)} |"
            )
    return lines if result["scores"] else ["Not scored."]


def _interval(found: dict[str, float]) -> str:
    return f"{100 * found['value']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
