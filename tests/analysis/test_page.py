from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from scivi.analysis import report
from scivi.analysis.numerals import breakable, measured, number
from tests.analysis.conftest import make_tree

VOID = {"meta", "img", "source", "wbr", "br"}


class Page(HTMLParser):
    """Reads a page: its tags must nest; keeps headings, anchors, and the text of table cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.images: list[dict[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found["id"]} if "id" in found else set()
        self.links |= {found["href"]} if "href" in found else set()
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        if tag in ("img", "source"):
            self.images.append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(make_tree(rows=60, scale=0.4), to=path)
    return path.read_text(encoding="utf-8")


def test_tags_nest_headings_descend_and_links_lead_somewhere(html):
    page = Page(html)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= page.ids


def test_every_figure_has_a_picture_for_a_phone_and_words_for_who_cannot_see_it(html):
    images = [image for image in Page(html).images if "alt" in image]
    phones = [image for image in Page(html).images if "srcset" in image]
    assert len(images) == len(phones) == 5
    for wide, small in zip(images, phones, strict=True):
        assert re.match(r"Figure: \w.{8,}\.", wide["alt"])
        data = (wide["src"].partition(",")[2], small["srcset"].partition(",")[2])
        first, second = (Image.open(io.BytesIO(base64.b64decode(text))) for text in data)
        assert first.width == 2 * int(wide["width"])  # two dots for each pixel of the page
        assert second.width == 2 * 358  # a phone of 390 px, less the margins
        assert first.getpixel((0, 0))[3] == second.getpixel((0, 0))[3] == 0  # clear: dark pages show through


def test_what_failed_stands_first_and_has_a_word_beside_its_colour(html):
    marks = re.findall(r'class="mark (\w+)">(.)', html)
    order = ["fail", "warn", "pass", "mute"]
    assert [order.index(style) for style, _ in marks] == sorted(order.index(style) for style, _ in marks)
    assert set(marks) <= {("fail", "✗"), ("warn", "!"), ("pass", "✓"), ("mute", "·")}
    assert ("fail", "✗") in marks


def test_light_dark_narrow_and_paper_are_all_seen_to(html):
    for query in ("prefers-color-scheme:dark", "max-width:640px", "@media print"):
        assert query in html
    assert html.count("<table") == html.count('class="scroll"') + html.count('class="checks"')


def contrast(one: str, other: str) -> float:
    """Of two colours, WCAG 2.2: (L1 + .05) / (L2 + .05), L the relative luminance."""

    def luminance(colour: str) -> float:
        v = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(
            np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_in_light_and_dark(html):
    schemes = re.findall(r"(--ink:.*?)--figure", html, re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colour = dict(re.findall(r"--([\w-]+):(#\w{6})\b", scheme))
        pairs = [(ink, paper) for ink in ("ink", "soft", "accent") for paper in ("paper", "wash")]
        pairs += [(tone, paper) for tone in ("good", "care", "bad") for paper in ("paper", f"{tone}-wash")]
        pairs += [("ink", f"{tone}-wash") for tone in ("good", "care", "bad")]
        for ink, paper in pairs:
            assert contrast(colour[ink], colour[paper]) >= 4.5, (ink, paper)  # WCAG level AA, small text


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.0, "0"),
        (12345.0, "12,345"),
        (-3, "−3"),
        (0.5, "0.5"),
        (0.06129, "0.0613"),
        (1.23456, "1.235"),
        (1234.56, "1,235"),
        (-2.5e-5, "−2.50×10⁻⁵"),
        (3.2e12, "3.20×10¹²"),
        (float("nan"), "–"),
        (float("inf"), "∞"),
        (True, "yes"),
        ("a<b", "a&lt;b"),
    ],
)
def test_numbers_are_told_as_readers_want_them(value, told):
    assert number(value) == told


def test_columns_keep_their_zeros():
    assert number(0.5, aligned=True) == "0.500"


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((0.27654, 0.1471, -0.0059), ["0.28", "0.15", "−0.01"]),
        ((1234.56, 12.3), ["1,235", "12"]),
        ((1.51e-9, 2.7e-10), ["1.51×10⁻⁹", "2.7×10⁻¹⁰"]),
        ((1.0, 0.0), ["1", "0"]),
        ((float("nan"), 1.0), ["–", "1"]),
    ],
)
def test_a_mean_has_the_digits_that_its_sd_leaves_it(numbers, told):
    assert measured(*numbers) == told


def test_names_can_be_broken():
    assert breakable("log_x[a<b, 2]") == "log_<wbr>x[<wbr>a&lt;b, <wbr>2]"
