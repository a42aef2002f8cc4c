"""recipes/chat.py: right answers in the terminal and on its page, base beside tuned, and a sentence for bad input."""

from __future__ import annotations

import importlib.util
import io
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import digits
import pytest
from PIL import Image
from recipe_runs import recipe

import vlm_sft

chat = recipe("chat")
QUESTION = "Which digit is this?"


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    return digits.quickstart(tmp_path_factory)


@pytest.fixture(scope="session")
def adapter(tiny_dir, tmp_path_factory) -> Path:
    return digits.adapter(tmp_path_factory.mktemp("adapter"), tiny_dir("llava15"))


@pytest.fixture
def digit(quickstart, tmp_path) -> tuple[Path, str]:
    """A picture that the quickstart did not train on and reads, as a file, and what it shows."""
    model, processor = vlm_sft.load_model(quickstart.folder), vlm_sft.load_processor(quickstart.folder)
    rows = quickstart.rows.select(range(10))
    said = vlm_sft.generate(model, vlm_sft.ChatTemplate(processor), rows, max_new_tokens=8, progress=False)
    shown = [row["messages"][-1]["content"] for row in rows]
    number = next(n for n in range(10) if said[n] == shown[n])
    rows[number]["images"][0].save(tmp_path / "digit.png")
    return tmp_path / "digit.png", shown[number]


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.new("RGB", (40, 30), "orange").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(capsys: pytest.CaptureFixture[str], **settings: Any) -> list[str]:
    """The lines that the recipe prints."""
    capsys.readouterr()
    chat.main(chat.RecipeArguments(**{name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}))
    return capsys.readouterr().out.splitlines()


def test_reads_a_digit_that_the_model_before_training_does_not(quickstart, digit, capsys):
    picture, shown = digit
    asked = {"model_name_or_path": quickstart.folder, "image": picture, "question": QUESTION, "max_new_tokens": 8}
    assert run(capsys, **asked) == [f"tuned: {shown}"]
    base, tuned = run(capsys, base_model=quickstart.base, **asked)
    assert tuned == f"tuned: {shown}"
    assert base.startswith("base: ")
    assert base != f"base: {shown}"


def test_adapter_beside_the_same_model_without_it(adapter, tiny_dir, photo, capsys):
    row = {"messages": [chat.turn("user", QUESTION, images=1)], "images": [Image.open(photo)]}
    processor = vlm_sft.load_processor(adapter)

    def alone(folder: Path) -> str:
        model = vlm_sft.load_model(folder)
        return vlm_sft.generate(model, vlm_sft.ChatTemplate(processor), [row], max_new_tokens=6, progress=False)[0]

    expected = {"base": alone(tiny_dir("llava15")), "tuned": alone(adapter)}
    assert expected["base"] != expected["tuned"]
    lines = run(capsys, model_name_or_path=adapter, image=photo, question=QUESTION, max_new_tokens=6)
    assert lines == "\n".join(f"{name}: {said}" for name, said in expected.items()).splitlines()


def test_a_talk_goes_on_from_what_was_said_until_an_empty_line(tiny_dir, photo, capsys, monkeypatch):
    rows = []
    monkeypatch.setattr(vlm_sft, "generate", lambda model, template, asked, **options: rows.extend(asked) or ["yes"])
    for typed in ("What is it?\nReally?\n\nnever read", "What is it?\nReally?\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        run(capsys, model_name_or_path=tiny_dir("llava15"), image=photo)
    first, second = rows[:2]
    assert len(rows) == 4
    assert [len(row["images"]) for row in (first, second)] == [1, 1]
    assert second["messages"] == [
        chat.turn("user", "What is it?", images=1),
        chat.turn("assistant", "yes"),
        chat.turn("user", "Really?"),
    ]


def test_base_and_tuned_are_asked_with_the_system_prompt_of_training(adapter, tmp_path, photo, capsys, monkeypatch):
    rows = []
    monkeypatch.setattr(vlm_sft, "generate", lambda model, template, asked, **options: rows.extend(asked) or ["yes"])
    run_folder = shutil.copytree(adapter, tmp_path / "run")
    (run_folder / "run.json").write_text('{"settings": {"recipe": {"system_prompt": "Be brief."}}}')
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\nReally?\n"))
    run(capsys, model_name_or_path=run_folder, image=photo)
    system, first = chat.turn("system", "Be brief."), chat.turn("user", "What is it?", images=1)
    second = [system, first, chat.turn("assistant", "yes"), chat.turn("user", "Really?")]
    assert [row["messages"] for row in rows] == [[system, first]] * 2 + [second] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "broken.png"}, r"image 'broken.png' is not an image that can be read: it begins with b'not a"),
        ({"image": "absent.png"}, r"image 'absent.png' does not exist"),
        ({"image": "."}, "is a directory"),
        ({"model_name_or_path": "no/such/folder"}, "No folder 'no/such/folder'"),
        ({"web": True}, "The page needs Gradio: pip install"),
    ],
)
def test_bad_input_is_told_in_a_sentence(settings, message, tiny_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_text("not a picture")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        run(capsys, **{"model_name_or_path": tiny_dir("llava15"), "question": QUESTION} | settings)


def test_question_without_a_picture_to_a_model_that_needs_one(tiny_dir, photo, capsys, monkeypatch):
    """As GotOcr2's processor refuses it (transformers 5.23)."""
    from transformers import LlavaProcessor

    process = LlavaProcessor.__call__

    def refuse(self, images=None, **options):
        if images is None:
            raise ValueError("You must provide valid `images`, found `None`")
        return process(self, images=images, **options)

    monkeypatch.setattr(LlavaProcessor, "__call__", refuse)
    asked = {"model_name_or_path": tiny_dir("llava15"), "question": QUESTION, "max_new_tokens": 2}
    with pytest.raises(ValueError, match=r"took no question without an image \(You must provide .*; give it one"):
        run(capsys, **asked)
    assert len(run(capsys, image=photo, **asked)) >= 1


def test_adapter_whose_base_is_gone(adapter, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"was trained on .*gone.*, which did not load .* Pass base_model="):
        run(capsys, model_name_or_path=digits.without_base(adapter, tmp_path / "moved"), question=QUESTION)


def test_port_in_use(tiny_dir, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(chat, "load", lambda args: pytest.fail("the model was loaded before the port was looked at"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127.0.0.1:{port}: Address already in use .* Try --port {port + 1}"):
            run(capsys, web=True, port=port)


def test_command_ends_with_the_sentence_and_no_traceback(tiny_dir, monkeypatch):
    flags = ["--model_name_or_path", str(tiny_dir("llava15")), "--image", "absent.png"]
    monkeypatch.setattr(sys, "argv", [chat.__file__, *flags])
    with pytest.raises(
        SystemExit, match=r"image 'absent\.png' does not exist[^\n]*$"
    ):  # a text: it is all Python prints
        runpy.run_path(chat.__file__, run_name="__main__")


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def served(*flags: object) -> Iterator[str]:
    """The address of the page while the command runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, chat.__file__, "--web", "--port", port, *flags]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        try:
            said = ""
            while "The page:" not in said:
                said = process.stdout.readline()
                assert said, f"the page ended with {process.wait()}"
            address = said.split()[-1]
            assert address == f"http://127.0.0.1:{port}"
            yield address
            assert process.poll() is None, "the page went down"
        finally:
            process.kill()


@pytest.mark.web
@pytest.mark.loopback
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="`make test-browser` runs it")
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_page_reads_a_digit_in_a_browser_and_stays_up_after_bad_input(quickstart, digit, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    picture, shown = digit
    broken = tmp_path / "broken.png"
    broken.write_text("<b>not a picture</b>")
    flags = ["--model_name_or_path", quickstart.folder, "--base_model", quickstart.base, "--max_new_tokens", 8]
    with served(*flags) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        reached = set()
        page.on("request", lambda request: reached.add(re.sub(r"(\w+://[^/]*).*", r"\1", request.url)))

        def ask(question: str, file: Path | None = None) -> None:
            if file is not None:
                page.locator("input[type=file]").set_input_files(file)
                page.get_by_label("Remove Image").wait_for()
            page.get_by_label("Question").fill(question)
            page.get_by_role("button", name="Ask").click()

        def error(words: str) -> None:
            toast = page.get_by_test_id("toast-body").filter(has_text=words)
            expect(toast).to_be_visible()
            toast.get_by_test_id("toast-close").click()

        page.goto(address)
        ask("  ")
        error("There is no question; write one.")
        ask(QUESTION, broken)
        error("image 'broken.png' is not an image that can be read: it begins with b'<b>not a pic")
        page.get_by_label("Remove Image").click()

        ask(QUESTION, picture)
        expect(page.get_by_label("Tuned")).to_have_value(shown)
        expect(page.get_by_label("Base")).not_to_have_value(shown)
        browser.close()
    assert {where for where in reached if not where.startswith(("data:", "blob:"))} == {address}
