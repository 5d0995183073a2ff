"""python benchmarks/answers_page.py [--rows 5000] [--runs 6]: how fast the report's answers open and filter.

It writes synthetic runs with texts of usual lengths, makes their report, and opens it in a headless Chromium
(`pip install 'tiedlora[browser]'`, and a chromium on the PATH). Times are from the start of the navigation, and
from the event of a control to the next frame that shows its rows.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.browser import ARGUMENTS, CHROMIUM
from helpers.report_runs import make_record, prediction_rows, score_run, write_run

from tiedlora.page import write

WORDS = ["the", "of", "a", "model", "answer", "number", "sum", "first", "then", "because", "result", "total", "train"]
WORDS += ["rows", "step", "loss", "apples", "pears", "left"]


def sentence(generator: np.random.Generator, words: int) -> str:
    return " ".join(generator.choice(WORDS, words))


def write_runs(root: Path, rows: int, runs: int) -> None:
    """Runs of two configurations; a fifth of the answers to a row are equal, and the others share their beginning."""
    generator = np.random.default_rng(0)
    prompts = [sentence(generator, 70) for _ in range(rows)]
    beginnings = [sentence(generator, 25) for _ in range(rows)]
    base_scores = (generator.random(rows) < 0.2).astype(float)
    base = prediction_rows(base_scores)
    for place, row in enumerate(base):
        base[place] = replaced(row, prompts[place], sentence(generator, 30))
    for number in range(runs):
        scores = (generator.random(rows) < 0.5).astype(float)
        ours = prediction_rows(scores)
        for place, row in enumerate(ours):
            ending = "" if generator.random() < 0.2 else sentence(generator, 20)
            ours[place] = replaced(row, prompts[place], f"{beginnings[place]} {ending}\n#### {int(scores[place])}")
        record = make_record(name="LoRA" if number % 2 else "TABuv", seed=number // 2)
        write_run(root, record)
        score_run(root, record, "validation", ours, base)


def replaced(row, prompt, output):
    return type(row)(**{**row.__dict__, "prompt": prompt, "output": output})


def seconds(page: Page, script: str) -> float:
    """From an event to the frame after its rows are shown."""
    code = (
        "async (change) => { const rows = document.getElementById('answers-rows');"
        "const shown = new Promise((done) => new MutationObserver(() => done()).observe(rows, {childList: true}));"
        "const start = performance.now(); eval(change); await shown;"
        "await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));"
        "return performance.now() - start; }"
    )
    return float(page.evaluate(code, script)) / 1000


CHANGES = {
    "where they differ": "document.querySelector('#answers-filter [value=differ]').click()",
    "who gained": "document.querySelector('#answers-filter [value=gained]').click()",
    "who lost": "document.querySelector('#answers-filter [value=lost]').click()",
    "first search": "const q = document.getElementById('answers-query'); q.value = 'apples pears';"
    "q.dispatchEvent(new Event('input'))",
    "second search": "const q = document.getElementById('answers-query'); q.value = 'model the';"
    "q.dispatchEvent(new Event('input'))",
    "another run": "const s = document.getElementById('answers-second'); s.value = 3;"
    "s.dispatchEvent(new Event('change'))",
    "order by gain": "const s = document.getElementById('answers-order'); s.value = 'gain';"
    "s.dispatchEvent(new Event('change'))",
    "next page": "document.getElementById('answers-next').click()",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--keep", type=Path, help="write the report there, and keep it")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    write_runs(root / "runs", arguments.rows, arguments.runs)
    out = arguments.keep or root / "report"
    started = time.process_time()
    write.write(write.build([root / "runs"]), out)
    size = (out / "index.html").stat().st_size
    print(
        f"{arguments.rows:,} rows x {arguments.runs} runs: report {time.process_time() - started:.1f} s, {size:,} bytes"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        # Evaluating a text is forbidden on the page, so the measurement goes around its policy.
        page = browser.new_context(viewport={"width": 1300, "height": 850}, bypass_csp=True).new_page()
        address = (out / "index.html").absolute().as_uri()
        started = time.perf_counter()
        page.goto(address)
        loaded = time.perf_counter() - started
        page.goto("about:blank")
        started = time.perf_counter()
        page.goto(f"{address}#answers?sheet=x")
        page.evaluate("document.getElementById('answers').scrollIntoView()")
        page.wait_for_selector(".answer")
        print(f"page loaded {loaded:.2f} s; first rows shown {time.perf_counter() - started:.2f} s")
        for name, change in CHANGES.items():
            print(f"{name:<20} {seconds(page, change):.3f} s   {page.locator('#answers-status').inner_text()}")
        browser.close()
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
