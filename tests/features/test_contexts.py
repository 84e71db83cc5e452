"""Examples of features as texts, tables and pages."""

import html.parser
import json
import math
import subprocess

import pytest

from patchlab.errors import OutputError
from patchlab.features import Context, Examples, FeatureExamples


class Outline(html.parser.HTMLParser):
    """The texts and attributes of a page; tags must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


CONTEXTS = (
    Context(4, None, 7, 3.0, (" the", " <b>", "\n"), (0.0, 3.0, 1.5), 1),
    Context(2, None, 1, 2.0, (" a", " cat"), (0.0, 2.0), 1),
    Context(5, None, 1, 1.0, (" one", " cat"), (0.0, 1.0), 1),
)


@pytest.fixture
def found():
    features = (
        FeatureExamples(3, "L1.F3.resid_post", 0.125, 1.75, CONTEXTS, ((" sits", 2.5), (' "quoted"', 1.0)), ((" stands", -2.0),)),
        FeatureExamples(7, "L1.F7.resid_post", 0.0, math.nan, (), (), ()),
    )
    return Examples("resid_post/1", "tiny", "own.txt", 40, 24, 1, features)


def test_one_feature(found):
    one = found[3]
    assert one.largest == 3.0
    assert one.tokens == ((" cat", pytest.approx(2 / 3)), (" <b>", pytest.approx(1 / 3)))
    assert str(CONTEXTS[1]) == "a [ cat]"


def test_summary(found):
    text = repr(found)
    assert text.splitlines()[0] == "Examples(resid_post/1 of tiny on 40 tokens of own.txt: 2 of 24 features, 1 more are never active)"
    assert "L1.F3.resid_post       12.50%  max 3        at:  cat,  <b>  +logits:  sits," in text
    assert "(never active)" in text


def test_table(found):
    table = found.table()
    assert list(table) == ["feature", "density", "mean", "max", "tokens", "promoted", "suppressed"]
    assert table.set_index("feature").loc[3, ["density", "mean", "max", "suppressed"]].tolist() == [0.125, 1.75, 3.0, " stands"]
    assert json.loads(table.to_json(orient="records"))[1]["mean"] is None


def test_page(found, tmp_path):
    found.save_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "http" not in text, "a page needs no network"
    page = Outline(text)
    words = "".join(page.words)
    for shown in (" <b>", "↵", ' "quoted"', "+2.50", "12.50%", "never active here"):
        assert shown in words
    links = [attrs["href"] for tag, attrs in page.found if tag == "a"]
    ids = [attrs["id"] for tag, attrs in page.found if tag == "section"]
    assert links == [f"#{name}" for name in ids] == ["#f3", "#f7"]
    assert sum(tag == "mark" for tag, _ in page.found) == 3, "one per context"
    assert [attrs["tabindex"] for tag, attrs in page.found if tag == "div" and "tabindex" in attrs] == ["0"], "what scrolls can be reached by keys"
    with pytest.raises(OutputError, match="exists and is not overwritten"):
        found.save_html(tmp_path / "page.html")
    found.save_html(tmp_path / "page.html", overwrite=True)


def test_piece_of_a_notebook(found):
    many = Examples("d", "m", "t", 40, 24, 0, tuple(FeatureExamples(i, f"F{i}", 0.1, 1.0, CONTEXTS, (), ()) for i in range(20)))
    page = Outline(many._repr_html_())
    assert sum(tag == "section" for tag, _ in page.found) == 12
    assert "and 8 more features; save_html writes them all." in "".join(page.words)
    assert "more features" not in "".join(Outline(found._repr_html_()).words)


@pytest.mark.slow
def test_the_page_is_drawn(found, tmp_path, browser):
    found.save_html(tmp_path / "page.html")
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,600", f"--screenshot={picture}"]
    subprocess.run([browser, *options, f"file://{tmp_path / 'page.html'}"], check=True, capture_output=True, timeout=600)
    assert picture.stat().st_size > 5_000
