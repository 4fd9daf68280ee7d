import base64
import io
import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfa.report.figures import Panel, encode
from dfa.report.page import Picture, Report, Table, write_page

EVIL = "<script>alert(\"x\")</script> & 'more' {title}"
VOID_ELEMENTS = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Checks that elements are properly nested, and collects text and image addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.images, self.seen, self.addresses = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        attributes = dict(attrs)
        self.addresses += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read(path):
    reader = Reader()
    reader.feed(Path(path).read_text())
    assert reader.open == []
    return reader


def picture(value=100, quality=None):
    return encode(np.full((4, 6, 3), value, np.uint8), quality=quality)


def full_report(text="plain"):
    return Report(
        title=text,
        scores={text: 52.34, "b": None, "c": float("nan")},
        tables=(Table(text, (text, "IoU"), ((text, 41.25), ("count", 12345), ("none", None)), bar_column=1),),
        figures=(Panel(text, picture()),),
        pictures=(Picture(text, (Panel(text, picture(quality=90)),), ((text, (1, 2, 3)),)),),
        provenance={text: text, "command": text},
        summary=text,
        notes={text: text},
    )


def test_all_text_is_escaped_wherever_it_appears(tmp_path):
    reader = read(write_page(full_report(EVIL), tmp_path / "report.html"))
    assert "script" not in reader.seen
    # title element, h1, summary, score label, its note, table title, column, cell, two captions, picture, legend, two
    # provenance values and one key
    assert sum(EVIL in text for text in reader.text) == 15
    assert all(image["alt"].startswith(EVIL) for image in reader.images)


def test_images_are_embedded_unchanged_and_nothing_is_loaded(tmp_path):
    reader = read(write_page(full_report(), tmp_path / "report.html"))
    kinds = sorted(address.split(";")[0] for address in reader.addresses)
    assert kinds == ["data:image/jpeg", "data:image/png"]
    data = [base64.b64decode(image["src"].split(",")[1]) for image in reader.images]
    assert sorted(data) == sorted([picture(quality=90), picture()])
    assert all(Image.open(io.BytesIO(one)).size == (6, 4) for one in data)
    assert not re.search(r"https?://|url\(|@import", (tmp_path / "report.html").read_text())


def test_numbers_have_one_decimal_and_missing_ones_a_dash(tmp_path):
    text = read(write_page(full_report(), tmp_path / "report.html")).text
    assert "52.3" in text and "41.2" in text and "12,345" in text
    assert text.count("–") == 3


def test_bars_follow_their_numbers_and_stay_inside(tmp_path):
    table = Table("t", ("c", "IoU"), (("a", 41.0), ("b", 180.0), ("c", None), ("d", -3.0)), bar_column=1)
    content = Path(write_page(Report("x", tables=(table,)), tmp_path / "report.html")).read_text()
    assert re.findall(r"width:([\d.]+)%\"", content) == ["41.0", "100.0", "0.0", "0.0"]


def test_empty_parts_leave_no_headings(tmp_path):
    reader = read(write_page(Report("Nothing yet"), tmp_path / "report.html"))
    assert "h2" not in reader.seen and "h1" in reader.seen


def test_a_failed_write_leaves_the_old_page_and_no_debris(tmp_path):
    path = Path(write_page(Report("old"), tmp_path / "report.html"))
    with pytest.raises(ValueError, match="PNG or JPEG"):
        write_page(Report("new", figures=(Panel("broken", b"GIF89a"),)), path)
    assert "old" in path.read_text() and [file.name for file in path.parent.iterdir()] == ["report.html"]
    write_page(Report("new"), path)
    assert "new" in path.read_text() and [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_reader_of_the_old_page_keeps_the_whole_old_page(tmp_path):
    path = Path(write_page(Report("old"), tmp_path / "report.html"))
    with path.open() as reader:
        write_page(Report("new"), path)
        content = reader.read()
    assert "old" in content and content.endswith("</html>\n") and "new" in path.read_text()


def test_a_path_that_cannot_be_replaced_leaves_no_debris(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(IsADirectoryError):
        write_page(Report("x"), tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_large_page_is_written_with_a_warning(tmp_path, caplog):
    noise = encode(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8))
    with caplog.at_level(logging.WARNING):
        assert Path(write_page(Report("x", figures=(Panel("noise", noise),)), tmp_path / "report.html")).exists()
    assert "large" in caplog.text


def test_tables_that_do_not_fit_their_columns_are_refused():
    with pytest.raises(ValueError, match="row 1: 1 cells for 2 columns"):
        Table("t", ("a", "b"), (("x", 1), ("y",)))
    with pytest.raises(ValueError, match="no column 2"):
        Table("t", ("a", "b"), (), bar_column=2)
