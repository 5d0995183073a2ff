"""What the benchmarks share: the workload, the baseline's model, the machine, and one measurement a process."""

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
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
MODEL = "smollm2_135m"
RANK, BATCH = 8, 8
PASS_TOKENS = 2048
"""Tokens a forward pass of ours: 1,024 are 4 % slower and take 0.4 GB less, more make no product faster here."""


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
    }


def config(*overrides: str) -> Any:
    """The defaults, changed."""
    from tiedlora.config.compose import compose_config

    given = {override.partition("=")[0] for override in overrides}
    kept = [f"{key}={value}" for key, value in defaults().items() if key not in given]
    return compose_config([*kept, *overrides])


def peak_memory() -> int:
    """The process's largest resident size, bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def restart_peak() -> int:
    """Begin `peak_memory` anew, from the process's present size, which is returned in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peft_lora(model: Any, adapter: Any = None) -> Any:
    """PEFT's LoRA on q, k and v, as our tying=LoRA_qkv; with our initial values if an adapter of ours is given."""
    import torch
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj"]
    settings = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    if adapter is not None:
        parts = adapter.parts()
        with torch.no_grad():
            for layer, block in enumerate(adapted.base_model.model.model.layers):
                for letter in "qkv":
                    site = getattr(block.self_attn, f"{letter}_proj")
                    site.lora_A["default"].weight.copy_(parts[f"{letter}.A"][layer])
                    site.lora_B["default"].weight.copy_(parts[f"{letter}.B"][layer])
    return adapted


def answers(
    model: Any, tokenizer: Any, prompts: list[tuple[int, ...]], task: Any, batch_size: int
) -> tuple[list[str], int]:
    """What transformers' generate writes, greedily, longest prompts first, and how many tokens that is."""
    import torch

    end, outputs, tokens = tokenizer.eos_token_id, {}, 0
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in chunk)
        ids = torch.tensor([[end] * (longest - len(prompts[i])) + list(prompts[i]) for i in chunk])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk])
        with torch.inference_mode():
            whole = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=task.max_new_tokens,
                do_sample=False,
                stop_strings=list(task.stop) or None,
                tokenizer=tokenizer,
                pad_token_id=end,
            )
        for i, row in zip(chunk, whole[:, longest:].tolist(), strict=True):
            written = row[: row.index(end)] if end in row else row
            tokens += len(written)
            text = tokenizer.decode(written, skip_special_tokens=True)
            first = len(text) - len(text.lstrip())
            places = [place for stop in task.stop if (place := text.find(stop, first)) >= 0]
            outputs[i] = text[: min(places, default=len(text))].strip()
    return [outputs[i] for i in range(len(prompts))], tokens


def measure(script: str, *arguments: str, threads: int | None = None) -> dict[str, Any]:
    """One measurement in a process of its own: the last line that `script --child ARGUMENTS` prints, as JSON."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, script, "--child", *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(f"{script} --child {' '.join(arguments)}: ended with {done.returncode}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["whole_seconds"] = time.perf_counter() - started
    return found


def matmul_rate(dtype: str, shape: tuple[int, int, int], seconds: float = 1.0) -> float:
    """FLOP/s of (m, k) @ (n, k)^T, the median of as many repeats as fit in `seconds`."""
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
    """What a figure is worth nothing without."""
    import torch
    import transformers

    name = "unknown processor"
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "bfloat16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def spread(values: Sequence[float]) -> str:
    """Median [least, most]."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """The figures and the machine they are of, as JSON, where somebody asked for it."""
    if path:
        path.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(cells)]
        return "| " + " | ".join(padded) + " |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(header), rule, *map(line, rows)])
