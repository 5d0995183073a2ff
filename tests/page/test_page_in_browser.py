"""The page in a real browser: what a reader sees, hostile texts, the keyboard, print, and accessibility (axe-core)."""

import pytest
from helpers.browser import needs_browser, opened
from helpers.hostile import HOSTILE
from helpers.report_runs import report_of_claim, scored_run

from tiedlora.page import browser, write
from tiedlora.text import visible_lines

pytestmark = [needs_browser(), pytest.mark.slow]
ROWS = 60


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two tasks, two configurations, two seeds. Of 60 rows LoRA has 30 right, TABuv has 20 of these and 5 others."""
    root = tmp_path_factory.mktemp("page")
    lora = [1.0] * 30 + [0.0] * 30
    tied = [1.0] * 20 + [0.0] * 10 + [1.0] * 5 + [0.0] * 25
    for task in ("chain_sum", "squad"):
        for seed in (0, 1):
            ours = [f"first {place} then {'right' if s else 'wrong'}" for place, s in enumerate(lora)]
            theirs = [f"first {place} then {'right' if s else 'wrong'}" for place, s in enumerate(tied)]
            ours[3], theirs[3] = HOSTILE, "<img src=x onerror=alert(1)>"
            theirs[4] = "z" * 2**20
            for name, outputs, scores in (("LoRA", ours, lora), ("TABuv", theirs, tied)):
                scored_run(root / "runs", scores, [0.0] * ROWS, output=outputs, name=name, seed=seed, task=task)
    write.write(report_of_claim(root), root / "report")
    return root / "report" / "index.html"


def to_answers(page):
    page.evaluate("document.getElementById('answers').scrollIntoView()")
    page.wait_for_selector(".answer")


def ids(page):
    return [text.removeprefix("row ") for text in page.locator(".answer .title .id").all_inner_texts()]


def open_rows(page):
    page.evaluate("document.querySelectorAll('.answer details').forEach((row) => { row.open = true; })")
    page.wait_for_selector(".answer .given")


def wait_for(page, text):
    page.wait_for_function("text => document.getElementById('answers-status').textContent.includes(text)", arg=text)


def test_rows_side_by_side_with_filters_and_counts(report):
    with opened(report) as page:
        to_answers(page)
        assert page.locator("#answers-status").inner_text() == "rows 1 to 20 of 60"
        assert page.locator(".answer .given").count() == 0, "rows are closed at first"
        page.locator(".answer summary").first.click(position={"x": 3, "y": 8})
        page.wait_for_selector(".answer .given")
        assert page.locator(".answer .given").count() == 1
        open_rows(page)
        columns = page.locator(".answer").nth(25 % 20).locator(".given b").all_inner_texts()
        assert columns == ["base", "LoRA r=8 · seed 0", "TABuv r=8 · seed 0"]
        counts = page.locator("#answers-filter b").all_inner_texts()
        # Rows 20 to 34 differ, and rows 3 and 4 do.
        assert counts == ["60", "17", "5", "10"]
        page.locator("#answers-filter [value=gained]").check(force=True)
        wait_for(page, "of 5")
        assert ids(page) == ["30", "31", "32", "33", "34"]
        open_rows(page)
        assert page.locator(".answer mark").all_inner_texts() == ["wrong", "right"] * 5
        assert "differs after" in page.locator(".given .second .none").first.inner_text()
        page.locator("#answers-filter [value=lost]").check(force=True)
        wait_for(page, "of 10")
        assert ids(page) == [str(number) for number in range(20, 30)]


def test_search_and_other_runs_and_order(report):
    with opened(report) as page:
        to_answers(page)
        page.locator("#answers-query").fill("first 41 then")
        wait_for(page, "rows 1 to 1 of 1")
        assert ids(page) == ["41"]
        page.locator("#answers-query").fill("nothing has this")
        wait_for(page, "no row")
        page.locator("#answers-query").fill("")
        page.locator("#answers-order").select_option("loss")
        wait_for(page, "of 60")
        page.wait_for_function("document.querySelector('.answer .title .id').textContent.includes('20')")
        page.locator(".also summary").click()
        page.locator("#answers-also label", has_text="TABuv r=8 · seed 1").click()
        page.wait_for_function("document.querySelectorAll('.answer')[0].querySelectorAll('.score').length === 4")
        page.locator("#answers-first").select_option(label="base")
        page.wait_for_function("document.querySelector('.answer .score').textContent.startsWith('base')")


def test_a_link_leads_to_a_row_of_another_task_and_the_pager_turns(report):
    with opened(report) as page:
        to_answers(page)
        page.locator("#answers-sheet").select_option(index=1)
        page.wait_for_timeout(300)
        page.locator("#answers-next").click()
        wait_for(page, "rows 21 to 40 of 60")
        open_rows(page)
        link = page.locator(".answer details > a").nth(5).get_attribute("href")
    with opened(report, suffix=link) as page:
        page.wait_for_selector(".answer.here")
        assert page.locator(".answer.here .title .id").inner_text() == "row 25"
        assert page.locator("#answers-sheet").input_value() == "1"
        assert page.evaluate("document.activeElement.className") == "answer here"
        assert page.locator(".answer.here .given").is_visible(), "the row of a link is open"


def test_hostile_answers_and_a_megabyte_line_stay_text(report):
    with opened(report) as page:
        to_answers(page)
        open_rows(page)
        row = page.locator(".answer").nth(3)
        assert row.locator(".first pre").text_content() == visible_lines(HOSTILE)
        assert row.locator(".second pre").text_content() == "<img src=x onerror=alert(1)>"
        assert page.locator("#answers img, #answers script").count() == 0
        long = page.locator(".answer").nth(4).locator(".second")
        assert len(long.locator("pre").text_content()) < 1000
        long.locator("button").click()
        shown = long.locator("pre").text_content()
        assert shown.startswith("z" * browser.LONGEST)
        assert "more characters in scores/" in shown


def test_a_line_of_a_claim_opens_its_reason_by_keyboard(report):
    with opened(report) as page:
        line = page.locator(".line").first
        assert not line.locator(".numbers").is_visible()
        line.locator("summary").focus()
        page.keyboard.press("Enter")
        assert line.locator(".numbers").is_visible()


def test_rows_with_losses_alone_have_no_empty_boxes_and_the_largest_difference_first(tmp_path):
    for name, last in (("LoRA", 1.0), ("TABuv", 3.0)):
        scored_run(tmp_path / "runs", [1.0, 2.0, 0.5, last], metric="target_loss", name=name)
    write.write(write.build([tmp_path / "runs"]), tmp_path / "report")
    with opened(tmp_path / "report" / "index.html") as page:
        to_answers(page)
        assert page.locator("#answers-title").inner_text() == "Rows"
        assert ids(page)[0] == "3"
        page.evaluate("document.querySelectorAll('.answer details').forEach((row) => { row.open = true; })")
        page.wait_for_selector(".asked")
        # Their prompts and references are in the record, and no answers.
        assert page.locator(".given > div").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 390])
def test_axe_finds_no_violation_and_nothing_is_wider_than_the_screen(report, width, theme):
    # The module is part of the extra `browser`.
    from axe_playwright_python.sync_playwright import Axe

    with opened(report, width, theme, bypass_csp=True) as page:
        page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
        to_answers(page)
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_an_empty_report_and_one_without_claims_open_without_a_message(tmp_path):
    (tmp_path / "none").mkdir()
    write.write(write.build([tmp_path / "none"]), tmp_path / "empty")
    scored_run(tmp_path / "runs", [1.0, 0.0] * 5, [0.0] * 10)
    write.write(write.build([tmp_path / "runs"]), tmp_path / "one")
    for name in ("empty", "one"):
        with opened(tmp_path / name / "index.html") as page:
            page.wait_for_timeout(200)
            assert page.locator("h1").is_visible()
