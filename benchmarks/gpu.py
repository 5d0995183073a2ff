"""python benchmarks/gpu.py [--out docs/gpu-report.md]: everything worth knowing about this project on a GPU, in a page.

`make gpu` starts it. It runs the smoke suite (tests/gpu), and then measures training, the loss, scoring, several cells
at once, and two processes, beside PEFT + Trainer and transformers' generate. Each part is a process of its own, and the
page is written after each of them: a part that fails is a line of the page, and what was measured before a stop is
kept.

With --rehearse, the same lines run on a CPU with a tiny model (`make gpu REHEARSE=1`). Its page says so, and is written
elsewhere. docs/gpu.md explains the page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import gpu_parts
import gpu_report
import psutil

REPORT = common.PROJECT / "docs" / "gpu-report.md"
REHEARSAL_REPORT = common.PROJECT / "report" / "gpu-rehearsal.md"
LONGEST_PART = 600
"""Seconds after which a measurement is given up. The tests have limits of their own."""
Measure = Callable[[str, Sequence[Any]], dict[str, Any]]
"""(part, arguments) -> figures. It raises RuntimeError with a line that says what went wrong."""


def parts(plan: gpu_parts.Plan, scratch: str, gpus: int) -> Iterator[tuple[Any, ...]]:
    """The measurements, in the order of their value: the time may end before the last one."""
    yield ("machine",)
    yield ("smoke",)
    first, *others = plan.models
    yield ("training", first, "compiled")
    yield ("peft", first, "plain")
    yield ("peft", first, "grouped")
    yield ("training", first, "not compiled")
    for way in ("train", "ours", "generate", "generate_batch"):
        yield ("scoring", way, scratch)
    for model in others or [first]:
        variants = [variant for variant in gpu_parts.VARIANTS if model != first or "," in variant]
        yield from (("training", model, variant) for variant in variants)
    for shape in plan.losses:
        yield ("losses", *shape)
    for at_once in plan.cells_at_once:
        yield ("cells", at_once)
    if gpus >= 2:
        yield from (("processes", 1, "false"), ("processes", 2, "false"), ("processes", 2, "true"))


class Reporter:
    """Measures the parts one after the other, and writes the page after each."""

    def __init__(self, out: Path, plan: gpu_parts.Plan, measure: Measure, command: str, minutes: float) -> None:
        self.out, self.plan, self.measure, self.command, self.minutes = out, plan, measure, command, minutes
        self.results: gpu_report.Results = {}
        self.started = time.perf_counter()

    def run(self, wanted: Sequence[str], gpus: int) -> gpu_report.Results:
        with tempfile.TemporaryDirectory() as scratch:
            for part, *arguments in parts(self.plan, scratch, gpus):
                if wanted and part not in wanted:
                    continue
                # The name of the scratch folder says nothing.
                shown = tuple(word for word in (part, *arguments) if word != scratch)
                self.results[shown] = self._figures(part, arguments)
                outcome = self.results[shown].get("error", "done")
                print(f"{self._minutes():5.1f} min  {' '.join(map(str, shown))}: {outcome}", flush=True)
                self._write()
        if gpus < 2 and (not wanted or "processes" in wanted):
            self.results["processes",] = {"error": f"needs two GPUs, and there {'is one' if gpus else 'is none'}"}
        self._write()
        return self.results

    def _figures(self, part: str, arguments: Sequence[Any]) -> dict[str, Any]:
        if self._minutes() > self.minutes:
            return {"error": f"left out, because {self.minutes:g} minutes were over (--minutes)"}
        try:
            return self.measure(part, arguments)
        except RuntimeError as error:
            return {"error": str(error)}

    def _minutes(self) -> float:
        return (time.perf_counter() - self.started) / 60

    def _write(self) -> None:
        about = {
            "command": self.command,
            "date": datetime.date.today().isoformat(),
            "commit": _commit(),
            "minutes": self._minutes(),
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(gpu_report.page(self.results, about, self.plan.rehearsed))


def _commit() -> str:
    from tiedlora.records.provenance import code_version

    return str(code_version()).removeprefix("commit ")


def in_own_process(plan: gpu_parts.Plan, environment: dict[str, str], part: str, arguments: Sequence[Any]) -> Any:
    """The figures of a part, measured in a fresh process.

    Raises:
        RuntimeError: it failed, or took longer than LONGEST_PART.
    """
    if part == "smoke":
        return smoke(environment)
    # The models beyond the first two were added by --model, whose names are those of the options.
    words = [plan.rehearsed, list(plan.models)[2:], part, arguments]
    command = [sys.executable, gpu_parts.__file__, json.dumps(words)]
    # One GPU, because Trainer would take all. Two processes need two.
    one = {} if part == "processes" or "CUDA_VISIBLE_DEVICES" in environment else {"CUDA_VISIBLE_DEVICES": "0"}
    try:
        code, out, err = outcome_of(command, {**environment, **one}, LONGEST_PART)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took longer than {LONGEST_PART} s") from None
    if code:
        raise RuntimeError(common.last_line(err))
    return json.loads(out.strip().splitlines()[-1])


def outcome_of(command: Sequence[str], environment: dict[str, str], seconds: float) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command. If it is given up, what it has started ends with it.

    Otherwise its programs would go on beside the next part, and slow it down.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            if process.poll() is None:
                for each in (*psutil.Process(process.pid).children(recursive=True), process):
                    each.kill()
    return process.returncode, out, err


def smoke(environment: dict[str, str]) -> dict[str, Any]:
    """The outcome of tests/gpu."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", f"--junitxml={xml}"]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=common.PROJECT, env=environment, capture_output=True, text=True)
        if not xml.exists():
            raise RuntimeError(common.last_line(done.stdout + done.stderr))
        cases = list(ElementTree.parse(xml).getroot().iter("testcase"))
    failures = [_told(case, kind) for case in cases for kind in ("failure", "error") if case.find(kind) is not None]
    skips = [_told(case, "skipped") for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failures) - len(skips),
        "failed": len(failures),
        "skipped": len(skips),
        "failures": failures,
        "skips": skips,
        "seconds": time.perf_counter() - started,
    }


def _told(case: ElementTree.Element, kind: str) -> str:
    """The name of a test, and the first line of what happened."""
    found = case.find(kind)
    message = "" if found is None else found.get("message", "")
    return f"{case.get('name')}: {' '.join(message.split())[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="run everything on a CPU with a tiny model")
    parser.add_argument(
        "--out", type=Path, help=f"where the page goes; by default {REPORT.relative_to(common.PROJECT)}"
    )
    parser.add_argument("--minutes", type=float, default=20, help="start no further part after so many minutes")
    parser.add_argument("--only", default="", help=f"some of smoke,{','.join(gpu_parts.PARTS)}; by default all")
    parser.add_argument("--model", action="append", default=[], help="also train this option of conf/model")
    arguments = parser.parse_args()
    wanted = [word for word in arguments.only.split(",") if word]
    if unknown := set(wanted) - {"smoke", *gpu_parts.PARTS}:
        parser.error(f"--only: {', '.join(sorted(unknown))}; choose from smoke, {', '.join(gpu_parts.PARTS)}")
    if arguments.rehearse and arguments.out and arguments.out.resolve() == REPORT:
        parser.error(f"--out: a rehearsal does not write {REPORT.name}, which is for figures of a GPU")
    environment = common.environment(TOKENIZERS_PARALLELISM="false")
    if arguments.rehearse:
        plan, gpus, out = gpu_parts.REHEARSAL, 2, arguments.out or REHEARSAL_REPORT
        environment |= {
            "CUDA_VISIBLE_DEVICES": "",
            "TIEDLORA_REHEARSE": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
    else:
        import torch

        if not (gpus := torch.cuda.device_count()):
            parser.error("there is no CUDA device here; --rehearse (make gpu REHEARSE=1) runs everything on a CPU")
        plan, out = gpu_parts.FULL.with_models(arguments.model), arguments.out or REPORT
    # Without --out: the page holds no paths.
    words = [*["--rehearse"] * arguments.rehearse, *(["--only", arguments.only] if arguments.only else [])]
    words += ["--minutes", f"{arguments.minutes:g}", *(word for name in arguments.model for word in ("--model", name))]
    command = " ".join(["python benchmarks/gpu.py", *words])
    reporter = Reporter(out, plan, lambda *work: in_own_process(plan, environment, *work), command, arguments.minutes)
    results = reporter.run(wanted, gpus)
    print(f"written: {out}")
    if any("error" in figures or figures.get("failed") for figures in results.values()) and arguments.rehearse:
        sys.exit("the rehearsal is not complete: the page says what failed")


if __name__ == "__main__":
    main()
