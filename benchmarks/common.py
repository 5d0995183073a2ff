"""Code that the benchmarks share: the workload, the machine, one measurement per process, tables.

torch and tiedlora are imported inside functions: a process that only starts measurements and prints a table does not
need them, and a measurement's memory contains only what it imports itself.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiedlora.config.schema import Config

PROJECT = Path(__file__).resolve().parents[1]
MODEL = "smollm2_135m"
RANK, BATCH = 8, 8
PASS_TOKENS = 2048
"""Tokens of our forward pass. 1,024 are 4 % slower and need 0.4 GB less; more tokens make no matrix product faster."""


def defaults() -> dict[str, str]:
    """GSM8K rows (below TIEDLORA_DATA, or ../shared/data of the checkout), SmolLM2-135M, rank 8, batch 8."""
    return {
        "model": MODEL,
        "task": "gsm8k",
        "data_root": os.environ.get("TIEDLORA_DATA", str(PROJECT.parent / "shared" / "data")),
        "rank.r": str(RANK),
        "train.batch_size": str(BATCH),
        "train.warmup_steps": "0",
        "train.schedule": "constant",
        "train.lr": "1e-3",
        "tracking": "none",
    }


def config(*overrides: str) -> Config:
    """The default configuration with some overrides."""
    from tiedlora.config.compose import compose_config

    overridden = {override.partition("=")[0] for override in overrides}
    kept = [f"{key}={value}" for key, value in defaults().items() if key not in overridden]
    return compose_config([*kept, *overrides])


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that is measured. Its runs are not uploaded, and W&B is not timed."""
    return {**os.environ, "WANDB_MODE": "disabled", **more}


def measure(script: str, *arguments: str, threads: int | None = None) -> dict[str, Any]:
    """One measurement in its own process: the last line that `script --child ARGUMENTS` prints, parsed as JSON.

    `whole_seconds` is added: the time from the process's start to its end.
    """
    own = environment(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if threads:
        own["OMP_NUM_THREADS"] = str(threads)
    started = time.perf_counter()
    child = subprocess.run([sys.executable, script, "--child", *arguments], env=own, capture_output=True, text=True)
    if child.returncode != 0:
        sys.exit(f"{script} --child {' '.join(arguments)}: ended with {child.returncode}\n{child.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    return {**figures, "whole_seconds": time.perf_counter() - started}


def run_command(command: Sequence[str]) -> None:
    """Run a command to its end, without its output.

    Raises:
        RuntimeError: it failed; with the last line of its standard error.
    """
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(last_line(done.stderr))


def last_line(text: str) -> str:
    """The last line that is not blank, at most 500 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["ended without a message"])[-1][:500]


def matmul_rate(dtype: str, shape: tuple[int, int, int], seconds: float = 1.0) -> float:
    """The rate of the product (m, k) @ (n, k)^T in FLOP/s: the median of as many repeats as `seconds` allow."""
    import torch

    m, k, n = shape
    x, weight = torch.randn(m, k).to(getattr(torch, dtype)), torch.randn(n, k).to(getattr(torch, dtype))
    times: list[float] = []
    for _ in range(3):
        torch.nn.functional.linear(x, weight)
    while sum(times) < seconds or len(times) < 5:
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - started)
    return 2 * m * k * n / statistics.median(times)


def machine() -> dict[str, Any]:
    """The processor and the versions for which a figure is valid."""
    import torch
    import transformers

    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    processor = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    return {
        "processor": processor[1] if processor else "unknown processor",
        "cores": os.cpu_count(),
        "bfloat16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in cpuinfo],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def spread(values: Sequence[float]) -> str:
    """Median [smallest, largest]."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures and the machine as JSON. If `path` is None, write nothing."""
    if path:
        path.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(cells)]
        return "| " + " | ".join(padded) + " |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(header), rule, *map(line, rows)])
