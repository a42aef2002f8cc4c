"""The picture shows the history, the page shows and sorts the samples, run.json tells all but secrets."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import matplotlib.figure
import pytest
import runs
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import BitsAndBytesConfig
from trl import SFTConfig

from vlm_sft.reports import Sample, plot_loss, write_run_json, write_samples_html

HISTORY = [
    {"step": 1, "loss": 4.0, "learning_rate": 1e-3},
    {"step": 2, "loss": 3.0, "learning_rate": 5e-4},
    {"step": 2, "eval_loss": 3.5},
    {"step": 3, "loss": 2.5, "learning_rate": 2e-4},
    {"step": 4, "loss": 2.0, "learning_rate": 0.0},
    {"step": 4, "eval_loss": 3.0},
    {"step": 4, "train_runtime": 9.0, "train_loss": 2.9},
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, path: (figures.append(self), save(self, path))
    )
    return figures


def test_plot_holds_the_history(tmp_path, drawn):
    plot_loss(HISTORY[::-1], tmp_path / "new" / "loss.png")
    assert Image.open(tmp_path / "new" / "loss.png").size == (1350, 810)
    upper, lower = drawn[0].axes
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in upper.lines}
    assert lines["training, 2 at the end"] == [[1, 4], [2, 3], [3, 2.5], [4, 2]]
    assert lines["evaluation, best 3 at step 4"] == [[2, 3.5], [4, 3]]
    assert lower.lines[0].get_xydata().tolist() == [[1, 1e-3], [2, 5e-4], [3, 2e-4], [4, 0]]
    assert upper.get_yscale() == "linear"


def test_plot_smooths_without_lag_and_goes_logarithmic_for_a_long_fall(tmp_path, drawn):
    falling = [{"step": step, "loss": 5 * math.exp(-step / 50) + 0.01 * (step % 2)} for step in range(300)]
    plot_loss(falling, tmp_path / "loss.png")
    upper = drawn[0].axes[0]
    raw, smooth = (line.get_ydata() for line in upper.lines)
    assert upper.get_yscale() == "log"
    assert smooth[150] == pytest.approx(sum(raw[140:161]) / 21)
    assert smooth[0] == pytest.approx(sum(raw[:11]) / 11)


def test_plot_marks_what_is_not_finite(tmp_path, drawn):
    plot_loss([*HISTORY, {"step": 5, "loss": math.nan}, {"step": 6, "loss": math.inf}], tmp_path / "loss.png")
    [marks] = [line for line in drawn[0].axes[0].lines if line.get_label() == "2 not finite"]
    assert list(marks.get_xdata()) == [5, 6]


def test_plot_takes_what_there_is_and_refuses_nothing(tmp_path, drawn):
    plot_loss([{"step": 1, "eval_loss": 2.0}], tmp_path / "loss.png")
    plot_loss([{"step": 1, "loss": math.nan}], tmp_path / "loss.png")
    assert len(drawn) == 2
    with pytest.raises(ValueError, match="neither 'loss' nor 'eval_loss'"):
        plot_loss([{"step": 1, "train_runtime": 3.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(1)> & "quoted" {{rows}}'
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
    assert [attrs["src"][:23] for attrs in page.all("img")] == ["data:image/webp;base64,"] * 3
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


def test_pictures_lie_in_the_page_tiny_ones_exactly(tmp_path):
    write_samples_html(SAMPLES, tmp_path / "samples.html", picture_px=100)
    pictures = [
        (attrs.get("class"), Image.open(BytesIO(base64.b64decode(attrs["src"].split(",")[1]))))
        for attrs in Page(tmp_path / "samples.html").all("img")
    ]
    assert [(kind, picture.size) for kind, picture in pictures] == [
        ("small", (2, 1)),
        (None, (100, 33)),
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


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_page_filters_searches_and_sorts_in_a_browser(tmp_path):
    write_samples_html(SAMPLES, tmp_path / "samples.html")
    allowed = base64.b64encode(hashlib.sha256(DRIVER.encode()).digest()).decode()
    page = (tmp_path / "samples.html").read_text().replace("script-src '", f"script-src 'sha256-{allowed}' '")
    (tmp_path / "driven.html").write_text(page.replace("</body>", f"<script>{DRIVER}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
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


def report(path: Path, **options) -> tuple[dict, str]:
    """run.json as read back, and as text."""
    defaults = {"settings": {}, "datasets": {}, "results": {}}
    write_run_json(path / "new" / "run.json", **defaults | options)
    text = (path / "new" / "run.json").read_text()
    return json.loads(text), text


def test_run_json_tells_what_was_quantized_and_trained(tmp_path, tiny_model):
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"])
    model = tiny_model("llava15", quantization_config=quantized)
    lora = LoraConfig(target_modules=r"model\.language_model.*\.[qv]_proj")
    data = {"train": runs.rows(8), "eval": runs.rows(3)}
    found, _ = report(tmp_path, model=get_peft_model(model, lora), datasets=data, results={"eval_loss": 1.5})
    layers = "base_model.model.model.language_model.layers.*"
    assert found["model"]["trained"] == {
        f"{layers}.self_attn.{name}.lora_{half}.default.weight": 2 for name in ("q_proj", "v_proj") for half in "AB"
    }
    assert found["model"]["quantized"][f"{layers}.self_attn.q_proj.base_layer.weight"] == 2
    assert found["model"]["quantized"][f"{layers}.mlp.up_proj.weight"] == 2
    assert not any("lm_head" in name or "norm" in name for name in found["model"]["quantized"])
    assert found["model"]["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = tiny_model("llava15").num_parameters()
    assert found["model"]["parameters"] == whole + found["model"]["trainable_parameters"]
    assert {split: facts["rows"] for split, facts in found["data"].items()} == {"train": 8, "eval": 3}
    assert found["results"] == {"eval_loss": 1.5}
    assert found["versions"]["torch"].startswith("2.")
    assert found["peak_memory_bytes"]["process"] > 50 << 20
    assert found["hardware"]["processes"] == 1
    assert 0 < found["process_runtime_s"] < 3600


def test_run_json_has_no_secret_and_no_folder_of_the_machine(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    token = "hf_" + "x" * 34
    plain = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}
    training = SFTConfig(output_dir="outputs/run", hub_token=token, **plain)
    settings = {
        "training": vars(training) | {"pad_token": "<pad>"},
        "recipe": {
            "model_name_or_path": "/home/somebody/models/llava",
            "dataset_name": str(tmp_path / "data" / "digits"),
            "api_key": "1234",
            "notes": [f"sent {token} to https://example.org", "see /home/somebody/notes.txt"],
            "path": Path("/data/secret-project/photos"),
        },
    }
    found, text = report(tmp_path, model=tiny_model("llava15"), settings=settings)
    for secret in (token, "somebody", "1234", "secret-project", str(tmp_path)):
        assert secret not in text
    assert found["settings"]["recipe"] == {
        "model_name_or_path": ".../llava",
        "dataset_name": "data/digits",
        "api_key": "(hidden)",
        "notes": ["sent (hidden) to https://example.org", "see ~/notes.txt"],
        "path": ".../photos",
    }
    assert found["settings"]["training"]["pad_token"] == "<pad>"
    assert found["settings"]["training"]["hub_token"] == "(hidden)"


def test_run_json_names_the_commit_of_the_script(tmp_path, tiny_model, monkeypatch):
    import __main__

    script = tmp_path / "repository" / "train.py"
    script.parent.mkdir()
    script.write_text("")
    monkeypatch.setattr(__main__, "__file__", str(script), raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    model = tiny_model("llava15")
    assert report(tmp_path, model=model)[0]["git"] is None
    git = ["git", "-C", str(script.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    for verb in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *verb], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert report(tmp_path, model=model)[0]["git"] == {"commit": commit, "changed_files": 0}
    script.write_text("print()")
    (script.parent / "outputs").write_text("not of the repository")
    assert report(tmp_path, model=model)[0]["git"] == {"commit": commit, "changed_files": 1}
