"""The pages that people read first: short sentences, few numbers, no term before its explanation; and all links.

`python tests/test_pages.py FILE ...` prints the counts of any pages.
"""

import re
import sys
from pathlib import Path
from statistics import mean

import pytest

from tiedlora.places import PROJECT

PLAIN = ("README.md", "docs/findings.md")
"""The pages with limits."""
PAGES = sorted(
    path.relative_to(PROJECT) for pattern in ("*.md", "docs/*.md", "studies/*/*.md") for path in PROJECT.glob(pattern)
)
GLOSSARY = "docs/results.md"
TERM = re.compile(r'^- <a id="(?P<anchor>[^"]+)"></a>\*\*(?P<term>[^*]+)\*\*', re.MULTILINE)
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]*)\)")
CODE = re.compile(r"^```.*?^```|^    .*?$|<!--.*?-->", re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    """The text without blocks of code and remarks; a word in backquotes is one word."""
    return re.sub(r"`[^`]*`", "CODE", CODE.sub("", text))


def sentences(text: str) -> list[str]:
    """The sentences outside of headings, tables and code, without the targets of links."""
    lines = [line for line in without_code(text).splitlines() if not line.startswith(("|", "#"))]
    blocks = re.split(r"\n\s*\n|\n(?=- |\d+\. )", LINK.sub(r"\g<text>", "\n".join(lines)))
    found = [part for block in blocks for part in re.split(r"(?<=[.!?])[*)]*\s+(?=[^a-z\s])", " ".join(block.split()))]
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def numbers(sentence: str) -> list[str]:
    """Its numbers. The 8 of `r 8` and the 2 of a name are none."""
    return re.findall(r"(?<![\w.,-])[+\u2212-]?\d[\d,]*(?:\.\d+)?(?![\w-])", re.sub(r"\br \d+", "", sentence))


def words(text: str) -> int:
    """How many words its sentences have."""
    return sum(len(re.findall(r"[^\W_][\w'-]*", sentence)) for sentence in sentences(text))


def unexplained(text: str) -> list[str]:
    """The terms of the glossary that first stand where neither a link nor emphasis explains them."""
    text, found = without_code(text), []
    for anchor, term in TERM.findall((PROJECT / GLOSSARY).read_text()):
        pattern = r"\s+".join("(?:its|their)" if word == "its" else re.escape(word) for word in term.split())
        pattern = rf"\b{pattern}s?\b"
        first = re.search(pattern, LINK.sub(r"\g<text>", text), re.IGNORECASE)
        explained = rf"\[[^\]]*{pattern}[^\]]*\]\([^)]*#{re.escape(anchor)}\)|\*{pattern}\*"
        place = re.search(explained, text, re.IGNORECASE)
        if first and (not place or re.search(pattern, LINK.sub(r"\g<text>", text[: place.start()]), re.IGNORECASE)):
            found.append(term)
    return found


def anchors(path: Path) -> set[str]:
    """What a link into the page may name: its headings, as GitHub writes them, and its own marks."""
    text = path.read_text()
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", LINK.sub(r"\g<text>", head).lower()).replace(" ", "-") for head in heads)
    return {*slugs, *re.findall(r'<a id="([^"]+)">', text)}


@pytest.mark.parametrize("page", PLAIN)
def test_sentences_are_short_have_few_numbers_and_explain_their_terms(page):
    text = (PROJECT / page).read_text()
    lengths = [words(sentence) for sentence in sentences(text)]
    assert mean(lengths) <= 22
    assert [sentence for sentence in sentences(text) if len(numbers(sentence)) > 3] == []
    assert unexplained(text) == []


def test_the_readme_is_short_and_a_finding_is_read_at_a_glance():
    readme = (PROJECT / "README.md").read_text()
    assert len(readme.splitlines()) <= 90
    assert words(readme) <= 700
    rows = re.findall(r"^\|(.*)\|$", (PROJECT / "docs" / "findings.md").read_text(), re.MULTILINE)
    cells = [LINK.sub(r"\g<text>", cell) for row in rows for cell in row.split(" | ")]
    assert [cell for cell in cells if len(cell.split()) > 15] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_inside_the_project_has_its_file_and_its_heading(page):
    text = re.sub(r"^```.*?^```", "", (PROJECT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in (found["target"] for found in LINK.finditer(text) if "://" not in found["target"]):
        name, _, anchor = target.partition("#")
        path = (PROJECT / page).parent / name if name else PROJECT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_counts_are_right():
    text = "# A look\n\nOne has 1,000 words at r 8. It (2.5) is `3`\nlong: [4](x.md#look)!\n\n| 5 |\n\n    6\n"
    assert [numbers(sentence) for sentence in sentences(text)] == [["1,000"], ["2.5", "4"]]
    assert unexplained("A [look](y.md#look), then looks; *floor* and a floor.") == []
    assert unexplained("A look, then a [look](y.md#look).") == ["look"]


if __name__ == "__main__":
    for file in sys.argv[1:]:
        page = Path(file).read_text()
        each = [words(sentence) for sentence in sentences(page)]
        counted = [len(numbers(sentence)) for sentence in sentences(page)]
        print(
            f"{file}: {len(page.splitlines())} lines, {words(page)} words, {mean(each):.1f} words a sentence (longest "
            f"{max(each)}), {mean(counted):.2f} numbers a sentence (most {max(counted)}), {len(unexplained(page))} "
            f"terms unexplained: {', '.join(unexplained(page))}"
        )
