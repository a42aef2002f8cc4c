"""The page shows the samples as text, sorts and filters them, and opens from disk."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from vlm_sft.evaluation.pages import Sample, write_samples_html

EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(1)> & "quoted" {{ samples }} {% for'
PIXELS = Image.frombytes("RGB", (2, 1), bytes([255, 0, 0, 0, 0, 255]))
SAMPLES = [
    Sample(images=[PIXELS], question="Which?", reference="7", before="1", after="7", score=1.0, score_before=0.0),
    Sample(images=[], question=EVIL, reference=EVIL, before="a", after=EVIL, score=0.5, score_before=1.0),
    Sample(
        images=[Image.new("L", (900, 300)), PIXELS],
        question="Both?",
        reference="10",
        before="10",
        after="10",
        score=1.0,
        score_before=1.0,
    ),
]


class Page(HTMLParser):
    """Tags with their attributes, and the rows of the table as text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_page_shows_every_text_as_text(tmp_path):
    write_samples_html(SAMPLES, tmp_path / "new" / "samples.html", title=EVIL, subtitle=EVIL)
    page = Page(tmp_path / "new" / "samples.html")
    assert page.rows[1:3] == [
        ["1", "", "Which?", "7", "1", "7", "1"],
        ["2", "", EVIL, EVIL, "a", EVIL, "0.5"],
    ]
    assert len(page.all("script")) == 1
    assert [attrs["src"].partition(";")[0] for attrs in page.all("img")] == [
        f"data:image/{k}" for k in ("png", "jpeg", "png")
    ]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not any(attrs.get("src", "data:").startswith("http") or "href" in attrs for _, attrs in page.tags)


def test_page_counts_and_sorts_rows_into_filters(tmp_path):
    write_samples_html(SAMPLES, tmp_path / "samples.html")
    page = Page(tmp_path / "samples.html")
    assert [attrs["data-kinds"] for attrs in page.all("tr")[1:]] == ["all right fixed", "all wrong broken", "all right"]
    text = (tmp_path / "samples.html").read_text()
    counts = dict(re.findall(r'data-kind="(\w+)" aria-pressed="\w+">[^<]+<span>(\d+)</span>', text))
    assert counts == {"all": "3", "right": "2", "wrong": "1", "fixed": "1", "broken": "1"}
    assert re.findall(r"<dd>([^<]+)</dd>", text) == ["83.3%", "66.7%", "3"]
    marks = [attrs["class"].split()[1] for attrs in page.all("span") if (attrs.get("class") or "").startswith("mark")]
    assert marks == ["wrong", "right", "right", "wrong", "right", "right"]  # before and after, row by row


def test_page_without_before_has_no_such_column_and_filters(tmp_path):
    alone = [Sample(images=[], question="q", reference="r", after="", score=0.0)]
    write_samples_html(alone, tmp_path / "samples.html")
    text = (tmp_path / "samples.html").read_text()
    assert "Before" not in text
    assert "Newly" not in text
    assert "(nothing)" in text


def test_images_lie_in_the_page_tiny_ones_exactly(tmp_path):
    write_samples_html(SAMPLES, tmp_path / "samples.html")
    pictures = [
        (attrs.get("class"), Image.open(BytesIO(base64.b64decode(attrs["src"].split(",")[1]))))
        for attrs in Page(tmp_path / "samples.html").all("img")
    ]
    assert [(kind, picture.size) for kind, picture in pictures] == [
        ("small", (2, 1)),
        (None, (480, 160)),
        ("small", (2, 1)),
    ]
    assert pictures[0][1].convert("RGB").tobytes() == PIXELS.tobytes()


def test_the_policy_names_exactly_the_page_s_own_script_and_style(tmp_path):
    write_samples_html(SAMPLES, tmp_path / "samples.html")
    text = (tmp_path / "samples.html").read_text()
    [policy] = [attrs["content"] for attrs in Page(tmp_path / "samples.html").all("meta") if "http-equiv" in attrs]
    for element in ("script", "style"):
        inside = re.search(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_page_refuses_no_samples_and_half_told_ones(tmp_path):
    with pytest.raises(ValueError, match="no samples"):
        write_samples_html([], tmp_path / "samples.html")
    untold = Sample(images=[], question="q", reference="r", after="a", score=0.0)
    with pytest.raises(ValueError, match="some have it"):
        write_samples_html([*SAMPLES, untold], tmp_path / "samples.html")
    assert not (tmp_path / "samples.html").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = """
const click = selector => document.querySelector(selector).click();
const rowsNow = () => [...document.querySelectorAll("tbody tr")];
const shown = () => rowsNow().filter(row => !row.hidden).map(row => row.cells[0].innerText);
const box = document.querySelector("input");
const found = [];
for (const kind of ["wrong", "fixed", "broken", "all"]) { click(`[data-kind=${kind}]`); found.push([kind, shown()]); }
for (const words of ["BOTH", "absent", ""]) {
  box.value = words;
  box.dispatchEvent(new Event("input"));
  found.push([words, shown()]);
}
for (const column of [4, 4, 7, 1]) { click(`th:nth-child(${column}) button`); found.push([column, shown()]); }
document.title = JSON.stringify(found);
"""


@pytest.mark.web
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_page_filters_searches_and_sorts_in_a_browser(tmp_path):
    write_samples_html(SAMPLES, tmp_path / "samples.html")
    allowed = base64.b64encode(hashlib.sha256(DRIVER.encode()).digest()).decode()
    page = (tmp_path / "samples.html").read_text().replace("script-src '", f"script-src 'sha256-{allowed}' '")
    (tmp_path / "driven.html").write_text(page.replace("</body>", f"<script>{DRIVER}</script></body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--no-first-run",
        "--disable-sync",
    ]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]
    output = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "driven.html").as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    found = json.loads(html.unescape(re.search("<title>(.*)</title>", output)[1]))
    assert found == [
        ["wrong", ["2"]],
        ["fixed", ["1"]],
        ["broken", ["2"]],
        ["all", ["1", "2", "3"]],
        ["BOTH", ["3"]],
        ["absent", []],
        ["", ["1", "2", "3"]],
        [4, ["2", "1", "3"]],  # references: </script>..., 7, 10
        [4, ["3", "1", "2"]],
        [7, ["2", "3", "1"]],  # scores: 0.5, 1, 1
        [1, ["1", "2", "3"]],
    ]


def test_words_that_are_new_are_marked(tmp_path):
    kept = {"images": [], "question": "What?", "reference": "a black cat", "score": 1.0, "score_before": 0.0}
    rows = [("a dog", "a black cat"), ("same", "same"), ("", "all new"), ("gone words", "")]
    write_samples_html([Sample(before=old, after=new, **kept) for old, new in rows], tmp_path / "page.html")
    cells = re.findall(r'data-label="After">(.*?)</td>', (tmp_path / "page.html").read_text("utf-8"))
    assert [re.findall("<b>(.*?)</b>", cell) for cell in cells] == [[" black cat"], [], ["all new"], []]
    assert [row[5] for row in Page(tmp_path / "page.html").rows[1:4]] == ["a black cat", "same", "all new"]
