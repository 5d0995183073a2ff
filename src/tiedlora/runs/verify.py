"""Receipts: does a finished run's folder still hold what its record says, and do its numbers come out again?

Each check looks at one thing and names what does not agree: a configuration key, a data row, a file, a prediction. The
quick ones need no weights; the last regenerates predictions from the adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiedlora.config import compose as configuration
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.records.run_folder import RunFolder, config_record, identity, run_id
from tiedlora.records.run_record import read_predictions
from tiedlora.scoring import scoring
from tiedlora.tasks import Example, Task, digest, load_examples, load_task
from tiedlora.text import visible

CLOSE = 1e-9
"""Metrics are recomputed in the same order from the same numbers; only a JSON round trip lies between."""


@dataclass
class Finding:
    """What one check found. `ok` is None where it could not be made here."""

    check: str
    ok: bool | None
    says: str


@dataclass
class _Run:
    """A run and what is loaded for checking it."""

    folder: RunFolder
    result: dict[str, Any]
    config: Config
    task: Task
    examples: dict[str, list[Example]]


def verify(path: Path, *, data_root: str | None = None, rows: int = 32, cache: Path | None = None) -> list[Finding]:
    """Check a run's folder.

    Args:
        data_root: where the rows are now, as for train.py; None takes the place the run was made with.
        rows: at least so many predictions a split are regenerated (whole scoring batches); 0 skips that.
        cache: where converted models are; None takes the run's own.

    Raises:
        UserError: the folder holds no finished run, or no readable configuration.
    """
    folder = RunFolder(path.absolute())
    result = folder.result()
    if result is None:
        raise UserError(f"{path}: has no result.json, so there is no finished run to verify")
    config = configuration.saved(folder.config_file)
    recorded = json.loads(json.dumps(config_record(config)))
    findings = list(_configuration(folder, result, config, recorded))
    config.data_root = data_root if data_root is not None else config.data_root
    config.cache = str(cache) if cache is not None else config.cache
    run = _Run(folder, result, config, load_task(config.task), {})
    checks: list[Callable[[_Run], Iterator[Finding]]] = [_files, _data, _adapter, _base, _predictions]
    for check in checks:
        findings += _guarded(check, run)
    if rows > 0:
        suspects = {f.says.split("row ")[1].split(":")[0] for f in findings if f.ok is False and "row " in f.says}
        findings += _guarded(lambda run: _regenerate(run, rows, suspects), run)
    return findings


def _guarded(check: Callable[[_Run], Iterator[Finding]], run: _Run) -> list[Finding]:
    """A check's findings; what it cannot read is itself a finding, so that the others still run."""
    found: list[Finding] = []
    try:
        found.extend(check(run))
    except UserError as error:
        found.append(Finding(getattr(check, "__name__", "regenerate").strip("_<>"), False, str(error)))
    return found


def _configuration(
    folder: RunFolder, result: dict[str, Any], config: Config, recorded: dict[str, Any]
) -> Iterator[Finding]:
    """config.yaml, result.json's configuration and identity, and the folder's name tell of one run."""
    differing = list(_differences(result["config"], recorded))
    differing += [
        f"identity.{key}" for key in _differences(result["identity"], json.loads(json.dumps(identity(config))))
    ]
    if differing:
        yield Finding("configuration", False, f"result.json and config.yaml disagree on {', '.join(differing[:5])}")
        return
    for where, found in (("result.json's run_id", result["run_id"]), ("the folder's name", folder.path.name)):
        if found != (made := run_id(config)):
            yield Finding("configuration", False, f"{where} is {found}, but the configuration makes {made}")
            return
    yield Finding(
        "configuration", True, f"config.yaml, result.json and the folder's name make one id, {run_id(config)}"
    )


def _differences(a: Any, b: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield f"{prefix} ({a!r:.40} and {b!r:.40})"


def _files(run: _Run) -> Iterator[Finding]:
    """The adapter's files and the predictions, against the sha256s that result.json holds."""
    expected: dict[str, str | None] = {}
    for recorded, names in [
        (run.result, ["adapter/adapter.json", "adapter/adapter.safetensors"]),
        *(
            (found, [f"predictions/{split}.jsonl", *([f"predictions/{split}.base.jsonl"] if "base" in found else [])])
            for split, found in run.result["scores"].items()
        ),
    ]:
        expected |= {name: recorded.get("files", {}).get(name) for name in names}
    now = run.folder.checksums(*expected)
    wrong = False
    for name, sha256 in expected.items():
        if name not in now:
            yield Finding(f"file {name}", False, "is missing")
        elif sha256 is not None and now[name] != sha256:
            yield Finding(f"file {name}", False, f"has sha256 {now[name][:12]}, result.json says {sha256[:12]}")
        else:
            continue
        wrong = True
    if unknown := [name for name, sha256 in expected.items() if sha256 is None]:
        yield Finding("files", None, f"not recorded: the sha256 of {', '.join(unknown)} (an older run)")
    elif not wrong:
        yield Finding("files", True, f"{len(expected)} files have the sha256 of result.json")


def _data(run: _Run) -> Iterator[Finding]:
    """The rows of every split that the run used, by content."""
    wanted = {split: found["digest"] for split, found in run.result["data"].items()}
    wanted |= {split: found["digest"] for split, found in run.result["scores"].items()}
    for split, expected in wanted.items():
        try:
            run.examples[split] = load_examples(run.task, split, run.config.data_root)
        except UserError as error:
            yield Finding(f"data {split}", None, f"cannot be read here ({error})")
            continue
        if digest(run.examples[split]) == expected:
            yield Finding(f"data {split}", True, f"{len(run.examples[split]):,} rows, sha256 {expected[:12]}")
            continue
        yield Finding(f"data {split}", False, f"is not what the run saw; {_changed_row(run, split)}")


def _changed_row(run: _Run, split: str) -> str:
    """The first row that differs from the predictions made on it."""
    try:
        rows = read_predictions(run.folder.predictions_file(split))
    except UserError:
        return "the run recorded the rows' hash alone, so which row it is cannot be said"
    examples = run.examples[split]
    if len(rows) != len(examples):
        return f"there were {len(rows)} rows, now {len(examples)}"
    for row, example in zip(rows, examples, strict=True):
        for key, now in (("id", example.id), ("prompt", example.prompt), ("references", list(example.references))):
            # A prompt that was shortened to fit is not the row's own.
            if row.get(key) != now and not (key == "prompt" and row.get("shortened")):
                return f"row {row['id']}: its {key} was {row.get(key)!r:.80}, now {now!r:.80}"
    return "prompts and references agree with the predictions, so a target or an id was changed"


def _adapter(run: _Run) -> Iterator[Finding]:
    """The adapter's own hash, and that it is this run's."""
    from tiedlora.adapter import load

    try:
        adapter, base = load(run.folder.adapter)
    except UserError as error:
        yield Finding("adapter", False, str(error))
        return
    # The tying's name and suggested rate are labels; what it means decides.
    same = {
        "base": (base, run.result["base"]),
        "tying": (identity(adapter.tying), identity(run.config.tying)),
        "rank": (adapter.rank, run.config.rank.r),
        "alpha": (adapter.alpha, run.config.rank.alpha),
        "seed": (adapter.seed, run.config.seed),
        "trainable parameters": (adapter.trainable_params(), run.result["trainable_params"]),
    }
    for name, (found, expected) in same.items():
        if found != expected:
            yield Finding("adapter", False, f"adapter.json: its {name} is {found!r:.80}, the run's {expected!r:.80}")
            return
    yield Finding("adapter", True, "adapter.safetensors has the sha256 of adapter.json, and is this run's")


def _base(run: _Run) -> Iterator[Finding]:
    """The base model that loads here, by its digest."""
    from tiedlora.models.base_model import describe

    recorded = run.result["base"]["digest"]
    now = describe(run.config.model)["digest"]
    if now is None:
        yield Finding(
            "base", None, f"{recorded}: a hub model's commit is known once it loads (regeneration compares it)"
        )
    else:
        says = str(recorded) if now == recorded else f"was {recorded}, here it is {now}"
        yield Finding("base", now == recorded, says)


def _predictions(run: _Run) -> Iterator[Finding]:
    """Each prediction's scores from its output, and the record's metrics from the scores."""
    for split, recorded in run.result["scores"].items():
        name = f"predictions {split}"
        ours = read_predictions(run.folder.predictions_file(split))
        theirs = read_predictions(run.folder.predictions_file(f"{split}.base")) if "base" in recorded else None
        counts = {len(rows) for rows in (ours, theirs) if rows is not None}
        if counts != {recorded["rows"]}:
            says = f"{' and '.join(map(str, sorted(counts)))} rows, result.json says {recorded['rows']}"
            yield Finding(name, False, says)
            continue
        wrong = [
            *_misscored(run, ours, split, name),
            *(_misscored(run, theirs, split, f"{name}.base") if theirs else []),
        ]
        yield from wrong
        found = {"metrics": scoring.summarise(ours, run.task)}
        if theirs is not None:
            found |= {"base": scoring.summarise(theirs, run.task), "gain": scoring.gains(ours, theirs, run.task)}
        off = [
            f"{kind}.{metric}.{key} (recorded {interval[key]:.6f}, recomputed {found[kind][metric][key]:.6f})"
            for kind in found
            for metric, interval in recorded[kind].items()
            for key in ("value", "low", "high")
            if abs(interval[key] - found[kind][metric][key]) > CLOSE
        ]
        if sum(row["output_tokens"] for row in ours) != recorded["output_tokens"]:
            off.append("output_tokens")
        if off:
            yield Finding(name, False, f"result.json disagrees on {'; '.join(off[:3])}")
        elif not wrong:
            yield Finding(name, True, f"{len(ours):,} rows give the recorded scores and intervals")


def _misscored(run: _Run, rows: list[dict[str, Any]], split: str, name: str) -> Iterator[Finding]:
    examples = run.examples.get(split)
    by_id = {example.id: example for example in examples} if examples else {}
    for row in rows:
        # Where the data are not at hand, the row's own references are what it was scored against.
        example = by_id.get(row["id"]) or _recorded_example(row)
        # A choice among given texts is scored by their likelihoods, which the row keeps.
        scores = run.task.score(row.get("log_likelihoods", row["output"]), example)
        if json.loads(json.dumps(scores)) != row["scores"]:
            yield Finding(name, False, f"row {row['id']}: its output scores {scores}, the file says {row['scores']}")


def _recorded_example(row: dict[str, Any]) -> Example:
    fields = {"id": row["id"], "prompt": row["prompt"], "target": "", "references": tuple(row["references"])}
    if "choices" in row:
        fields["choices"] = tuple(row["choices"])
    return Example(**fields)


def _regenerate(run: _Run, least: int, suspects: set[str]) -> Iterator[Finding]:
    """Outputs of whole scoring batches, from the adapter and from the base, compared with predictions/.

    A batch is repeated as it was, since rounding depends on which rows share it.
    """
    import torch

    from tiedlora.adapter import attach_adapter, load
    from tiedlora.data.encoding import Encoder
    from tiedlora.models.base_model import load_base
    from tiedlora.runs.session import device_of

    config = run.config
    if threads := re.fullmatch(r"cpu, (\d+) threads", str(run.result["device"])):
        torch.set_num_threads(int(threads[1]))
    device = torch.device(device_of(config.train.device))
    try:
        base = load_base(config.model, config.train.dtype, device, Path(config.cache))
    except UserError as error:
        yield Finding("regenerate", None, f"the base model cannot be loaded here ({error})")
        return
    if base.record != run.result["base"]:
        yield Finding("base", False, f"was {run.result['base']}, here it is {base.record}")
        return
    adapter, _ = load(run.folder.adapter)
    attached, encoder = attach_adapter(base.model, adapter), Encoder(base.tokenizer, config.task, config.model.context)
    for split in run.result["scores"]:
        if not (examples := run.examples.get(split)):
            continue
        rows = read_predictions(run.folder.predictions_file(split))
        if len(rows) != len(examples):
            yield Finding(f"regenerate {split}", False, f"{len(rows)} predictions of {len(examples)} rows")
            continue
        places = _batches(rows, scoring.scored_together(encoder, examples, config), least, suspects)
        chosen = [examples[place] for place in places]
        for kind in ("", ".base") if "base" in run.result["scores"][split] else ("",):
            recorded = read_predictions(run.folder.predictions_file(f"{split}{kind}"))
            if len(recorded) != len(examples):
                yield Finding(
                    f"regenerate {split}{kind}", False, f"{len(recorded)} predictions of {len(examples)} rows"
                )
                continue
            what = f"regenerating {split}{kind}"
            if kind:
                attached.disable()
                made = scoring.predict(base.model, encoder, run.task, chosen, config, what)
                attached.enable()
            else:
                with scoring.adapted(attached, config) as model:
                    made = scoring.predict(model, encoder, run.task, chosen, config, what)
            yield _compared(run, f"regenerate {split}{kind}", made, [recorded[place] for place in places])
    attached.detach()


def _batches(rows: list[dict[str, Any]], batches: list[list[int]], least: int, suspects: set[str]) -> list[int]:
    """Places of whole scoring batches: those of suspicious rows first, then from the shortest prompts up."""

    def doubted(batch: list[int]) -> bool:
        return any(rows[place]["id"] in suspects for place in batch)

    chosen: list[int] = []
    for batch in [*filter(doubted, batches), *(batch for batch in reversed(batches) if not doubted(batch))]:
        if len(chosen) >= least:
            break
        chosen += batch
    # In the split's order: scoring sorts by length, and equal lengths must stay in the order they had.
    return sorted(chosen)


def _compared(run: _Run, name: str, made: list[dict[str, Any]], recorded: list[dict[str, Any]]) -> Finding:
    different = [new["id"] for new, old in zip(made, recorded, strict=True) if new["output"] != old["output"]]
    if not different:
        return Finding(name, True, f"{len(made)} outputs come out as they were")
    says = f"row {different[0]}: another output than the recorded one ({len(different)} of {len(made)} rows differ)"
    return Finding(name, False, f"{says}; recorded on {run.result['device']}, where other devices may round otherwise")


def lines(findings: list[Finding]) -> list[str]:
    """One line a finding, and a last one that sums up."""
    words = {True: "ok", False: "WRONG", None: "skipped"}
    told = [f"{words[f.ok]:<8} {f.check:<28} {f.says}" for f in findings]
    wrong = [f.check for f in findings if f.ok is False]
    last = f"does not agree: {', '.join(dict.fromkeys(wrong))}" if wrong else "everything that was checked agrees"
    return [visible(line) for line in [*told, last]]
