"""Synthetic run folders with known true scores, for tests of the report. Records and rows are built as in a run."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from tiedlora import tying
from tiedlora.analysis.metrics import gains, summarise
from tiedlora.config.identity import config_tree, identity, run_id
from tiedlora.config.schema import Config, ModelConfig, RankConfig, TaskConfig, TrainConfig
from tiedlora.other_methods import TyingConfig
from tiedlora.page import write
from tiedlora.records import run_record
from tiedlora.records.loss_metrics import TARGET_LOSS, TARGET_LOSS_BY_TOKEN, loss_scores
from tiedlora.records.rows import MetricsRow, PredictionRow, Score, row_line
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import KINDS, Kind, ScoreRecord, kind_of, write_scores
from tiedlora.tasks import Task
from tiedlora.tying import LrFactors

SMOLLM2_135M = tying.Architecture(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536)
"""With the parameter counts of conf/model/smollm2_135m.yaml: LoRA 46,080 at r = 1, TABuv 41,328 at r = 8."""
METRIC = "exact_match_strict"
GOOD, BASE = [1.0, 0.0] * 25, [0.0] * 50
"""The scores of a run and of its base, of 50 rows."""


def make_config(name="TABuv", rank=8, seed=0, lr=1e-2, task="chain_sum", kind="gsm8k", model="org/tiny") -> Config:
    return Config(
        model=ModelConfig(name=model, context=512, architecture=SMOLLM2_135M),
        task=TaskConfig(name=task, kind=kind, prompt="{q}", target=" {a}"),
        tying=TyingConfig(**vars(tying.named(name))),
        rank=RankConfig(rank, float(rank)),
        train=TrainConfig(steps=100, batch_size=16, lr=lr, lr_factor=LrFactors()),
        seed=seed,
    )


def make_record(changes: dict[str, Any] | None = None, **about) -> run_record.RunRecord:
    """The record of a run.

    Args:
        changes: new values by dotted path: of the configuration where it starts with `config.`, such as
            {"config.train.steps": 5}, otherwise of the record, such as {"code.commit": "b"}.
    """
    changes = changes or {}
    config = make_config(**about)
    for path, value in changes.items():
        if path.startswith("config."):
            config = _changed(config, path.split(".")[1:], value)
    trainable = tying.trainable_params(config.tying, config.rank.r, config.model.architecture)
    record = run_record.RunRecord(
        run_id=run_id(config),
        identity=run_record.from_tree(run_record.Identity, identity(config)),
        config=run_record.from_tree(run_record.ConfigRecord, config_tree(config)),
        seed=config.seed,
        code=run_record.CodeVersion("a" * 40, dirty=False),
        versions={"python": "3.11", "torch": "2.13", "transformers": "5.24"},
        execution=run_record.Execution("cpu", threads=1),
        base=run_record.BaseModelRecord(config.model.name, "main", "sha256:1"),
        trainable_params=trainable,
        share_of_lora=trainable / tying.lora_params(config.rank.r, config.model.architecture),
        data={name: run_record.DataRecord(name, rows) for name, rows in (("train", 100), ("validation", 50))},
        training=run_record.TrainingRecord(
            **{"steps": 100, "tokens": 1000, "seconds": 10.0, "tokens_per_s": 100.0, "peak_memory_bytes": 2**30},
            **{"validation_loss_first": 2.0, "validation_loss_last": 1.0},
        ),
        adapter_bytes=4 * trainable,
        status="done",
    )
    for path, value in changes.items():
        if not path.startswith("config."):
            record = _changed(record, path.split("."), value)
    return record


def _changed(node: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of a dataclass or dict with the value at `path`."""
    name, *rest = path
    if isinstance(node, dict):
        return {**node, name: _changed(node[name], rest, value) if rest else value}
    return dataclasses.replace(node, **{name: _changed(getattr(node, name), rest, value) if rest else value})


def prediction_rows(
    scores: Sequence[Score], metric: str = METRIC, output: str | Sequence[str] = "#### 3"
) -> list[PredictionRow]:
    """A row for each score: a number, or the statistics of a corpus metric. `output` is one for all rows, or a list."""
    outputs = [output] * len(scores) if isinstance(output, str) else output
    rows = []
    for number, (text, score) in enumerate(zip(outputs, scores, strict=True)):
        value = list(map(float, score)) if isinstance(score, list) else float(score)
        prompt = f"Question {number}"
        rows.append(
            PredictionRow(str(number), prompt, ["3"], {metric: value}, output=text, output_tokens=3, ended="end")
        )
    return rows


def write_run(root: Path, record: run_record.RunRecord) -> Path:
    """The folder of a run that is not scored: result.json and metrics.jsonl."""
    folder = RunFolder(Path(root) / record.run_id)
    folder.path.mkdir(parents=True)
    folder.result_file.write_text(json.dumps(record.to_json()))
    losses = [MetricsRow(step, {"validation/loss": 2.0 - step / 100}) for step in (0, 50, 100)]
    losses += [MetricsRow(step, {"train/loss": 2.0 - step / 100}) for step in range(1, 101, 9)]
    write_lines(folder.metrics_file, losses)
    return folder.path


def write_lines(path: Path, rows: Sequence[MetricsRow]) -> None:
    """Write a JSON Lines file. It is not flushed to the disk, because this would take most of a test's time."""
    path.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))


def score_run(
    root: Path,
    record: run_record.RunRecord,
    split: str,
    rows: Sequence[PredictionRow],
    base: Sequence[PredictionRow] | None = None,
    task: Task | None = None,
    source: str = "",
) -> dict[Kind, ScoreRecord]:
    """Write a file of scores for each kind of metrics that the rows have, with the intervals that scoring gives them.

    Args:
        base: the base model's rows, which become a file that all runs with the same rows share.
    """
    folder, found = RunFolder(Path(root) / record.run_id), {}
    for kind in KINDS:
        if all(kind_of(metric) != kind for metric in rows[0].scores):
            continue
        own, theirs = _of_kind(rows, kind), _of_kind(base or [], kind)
        scored = found[kind] = _score_record(record, split, kind, own, theirs, task, source)
        found[kind] = write_scores(folder.scores_file(split, kind), scored, own)
        base_file = folder.base_scores_file(scored.base)
        if scored.base and not base_file.exists():
            of_base = _score_record(record, split, kind, theirs, [], task, source)
            write_scores(base_file, dataclasses.replace(of_base, run_id="", adapter="", base=scored.base), theirs)
    return found


def _of_kind(rows: Sequence[PredictionRow], kind: Kind) -> list[PredictionRow]:
    """The rows with their scores of this kind."""
    bare = {} if kind == "answers" else {"output": "", "output_tokens": 0, "ended": ""}
    found = []
    for row in rows:
        # dataclasses.replace takes ten times as long, and there are many rows.
        own = copy.copy(row)
        scores = {metric: score for metric, score in row.scores.items() if kind_of(metric) == kind}
        own.__dict__.update(scores=scores, **bare)
        found.append(own)
    return found


def _score_record(
    record: run_record.RunRecord,
    split: str,
    kind: Kind,
    rows: Sequence[PredictionRow],
    base: Sequence[PredictionRow],
    task: Task | None,
    source: str,
) -> ScoreRecord:
    metrics = list(rows[0].scores)
    if task is None:
        # Its metrics are means.
        task = Task(TaskConfig(name="synthetic", kind="synthetic"))
        task.metrics = tuple(metrics)
    whole, whole_base = list(map(_with_both_losses, rows)), list(map(_with_both_losses, base))
    found = summarise(whole, task, kind)
    gain = gains(whole, whole_base, task, kind) if base else {}
    lines = "".join(map(row_line, base)).encode()
    return ScoreRecord(
        run_id=record.run_id,
        adapter="0" * 64,
        split=split,
        kind=kind,
        digest=f"{record.identity.task.name}-{split}",
        rows=len(rows),
        metrics={metric: found[metric] for metric in metrics},
        base=f"{split}-{kind}-{hashlib.sha256(lines).hexdigest()[:12]}" if base else "",
        gain={metric: gain[metric] for metric in metrics if base},
        seconds=1.0,
        batch_halvings=0,
        shortened=0,
        output_tokens=sum(row.output_tokens for row in rows),
        cut_targets=0,
        has_targets=True,
        source=source,
        source_digest="",
        signatures={},
        code=record.code,
        versions=record.versions,
        execution=record.execution,
        rows_sha256="",
    )


def _with_both_losses(row: PredictionRow) -> PredictionRow:
    """A row with one loss gets the other, because scoring always gives both."""
    if TARGET_LOSS not in row.scores or TARGET_LOSS_BY_TOKEN in row.scores:
        return row
    return dataclasses.replace(row, scores=loss_scores(4 * row.scores[TARGET_LOSS], 4))


def scored_run(
    root, ours, base=None, split="validation", metric=METRIC, output="#### 3", changes=None, **about
) -> Path:
    """A finished run with the scores of one split, from one score per example."""
    record = make_record(changes, **about)
    folder = write_run(root, record)
    of_base = None if base is None else prediction_rows(base, metric)
    score_run(root, record, split, prediction_rows(ours, metric, output), of_base)
    return folder


def diverge(root, pattern: str) -> Path:
    """Turn the one run below root that matches into one that has diverged."""
    (folder,) = root.glob(pattern)
    write_config(folder, RunFolder(folder).finished_record())
    (folder / "result.json").unlink()
    (folder / "error.txt").write_text("Traceback\ntiedlora.errors.Diverged: step 3: the loss is nan\n")
    return folder


def write_config(folder: Path, record: run_record.RunRecord) -> None:
    """A run's config.yaml, which says what a run without a result is."""
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(record.config.tree))


def world(root, truth, *, seeds=5, rows=200, base=0.1, seed_sd=0.01, rank=8, **about):
    """Runs with known true scores. `truth` maps configurations to success rates; examples differ in difficulty."""
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 0.1, rows)
    base_scores = generator.random(rows) < np.clip(base + difficulty, 0, 1)
    for name, p in truth.items():
        name, own_rank = name if isinstance(name, tuple) else (name, rank)
        for seed in range(seeds):
            chance = np.clip(p + difficulty + generator.normal(0, seed_sd), 0, 1)
            ours = (generator.random(rows) < chance).astype(float)
            scored_run(root, ours, base_scores.astype(float), name=name, rank=own_rank, seed=seed, **about)


def primary_row(rows, label):
    """The one row of the report that has the label, by its task's first metric."""
    (row,) = [row for row in rows if row.group.label == label and row.primary]
    return row


def report_of_claim(
    root,
    rule="retains: 0.9",
    method="TABuv, rank: 8",
    comparator="configuration: LoRA, at: equal_rank",
    tasks="[]",
    top="looks: [3, 5]",
    roots=("runs",),
):
    """The report of root/runs with one claim, whose keys have these texts.

    Args:
        top: the keys of the whole file.
        roots: the folders of runs below root.
    """
    (root / "claims.yaml").write_text(
        f"{top}\nclaims:\n  - name: x\n    method: {{configuration: {method}}}\n    comparator: {{{comparator}}}\n"
        f"    {rule}\n    tasks: {tasks}\n"
    )
    return write.build([root / folder for folder in roots], claims=root / "claims.yaml")
