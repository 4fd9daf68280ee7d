"""dfa/METHOD.md holds what docstrings cite, and names settings that exist."""

import dataclasses
import re
from pathlib import Path

from dfa.config import Config

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "dfa/METHOD.md").read_text(encoding="utf-8")
NUMBER = r"\d+(?:\.\d+|b)?"
# "METHOD 1.20, 4", "METHOD rows 1.7 to 1.12", "METHOD 1.14-1.17 and 1b", "METHOD 1.22, section 5"
CITED = re.compile(rf"METHOD (?:rows? |section )?({NUMBER}(?:(?:-| to |, (?:section )?| and ){NUMBER}\b(?!\.\d))*)")
RANGE = re.compile(r"1\.(\d+)(?:-| to )1\.(\d+)")


def numbers(citation):
    for first, last in RANGE.findall(citation):
        yield from (f"1.{number}" for number in range(int(first), int(last) + 1))
    yield from re.findall(NUMBER, citation)


def citations():
    """(file, number) of everything that sources and pages cite."""
    files = [path for folder in ("dfa", "jobs", "conf", "tests") for path in (ROOT / folder).rglob("*")]
    for path in sorted([*files, ROOT / "README.md"]):
        if path.suffix in (".py", ".yaml", ".md") and path not in (ROOT / "dfa/METHOD.md", Path(__file__)):
            text = re.sub(r"\s*\n\s*#?\s*", " ", path.read_text(encoding="utf-8"))  # a citation may cross a line's end
            for citation in CITED.findall(text):
                yield from ((str(path.relative_to(ROOT)), number) for number in numbers(citation))


def test_every_number_that_is_cited_is_a_heading_of_the_page():
    headings = set(re.findall(rf"^##+ ({NUMBER}) ", PAGE, re.MULTILINE))
    assert {f"1.{number}" for number in range(1, 23)} | {"1", "1b", "2", "3", "4", "5"} == headings
    cited = set(citations())
    assert len(cited) > 80
    assert sorted({(path, number) for path, number in cited if number not in headings}) == []


def test_citations_are_read_as_they_are_written():
    text = (
        "METHOD 1.20, 4; METHOD rows 1.7 to 1.9. METHOD 1.14-1.15 and 1b: METHOD 1.22, section 5, METHOD row 1.21: 50"
    )
    found = [sorted(set(numbers(citation))) for citation in CITED.findall(text)]
    assert found == [["1.20", "4"], ["1.7", "1.8", "1.9"], ["1.14", "1.15", "1b"], ["1.22", "5"], ["1.21"]]


def test_every_setting_that_the_page_names_exists():
    sections = {each.name: each.type for each in dataclasses.fields(Config) if dataclasses.is_dataclass(each.type)}
    named = set(re.findall(rf"`({'|'.join(sections)})\.(\w+)(?:: [^`]*)?`", PAGE))
    assert len(named) > 30
    known = {(section, each.name) for section, kind in sections.items() for each in dataclasses.fields(kind)}
    assert named - known == set()
