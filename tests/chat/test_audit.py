"""The audit passes what is right, with exact counts, and names the row of every fault."""

from __future__ import annotations

import base64
import random
import re
import runpy
from dataclasses import replace
from functools import partial
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import torch
from conversations import LEARNED, answer, ask, picture
from datasets import Dataset
from families import TEN
from markupsafe import escape
from PIL import Image

from vlm_sft import IGNORE_INDEX, ChatCollator
from vlm_sft.chat.audit import audit, check_embedding, check_forward, draw_mask
from vlm_sft.evaluation.pages import write_audit_html
from vlm_sft.tools import tiny

FAMILY_TABLE = Path(__file__).parents[2] / "benchmarks" / "family_table.py"
EQUAL = "equal those of inference"
REWRITTEN = "cannot, as the processor itself writes a longer conversation differently"


def one(text: str = "A cat.", **fields: Any) -> dict[str, Any]:
    return {"messages": [ask(None, "What is this?"), answer(text, **fields)], "images": [picture(40, 30)]}


def two() -> dict[str, Any]:
    messages = [ask(None, None, "Compare."), answer("Wide, tall."), ask("それは何", None), answer("日本語, é 🙂")]
    return {"messages": messages, "images": [picture(60, 30), picture(30, 60, 1), picture(40, 40, 2)]}


class Broken(ChatCollator):
    """The real collator with a fault in the row of the dataset's place 3."""

    def encode(self, examples):
        rows, inputs = super().encode(examples)
        return [self.spoil(row) if row.name == "row 3" else row for row in rows], inputs

    def spoil(self, row):
        raise NotImplementedError


class WithoutBos(Broken):
    def spoil(self, row):
        tokens = {key: value[1:] for key, value in row.tokens.items()}
        return replace(row, tokens=tokens, offsets=row.offsets[1:], labels=row.labels[1:], image=row.image[1:])


class TrainsEverything(Broken):
    def spoil(self, row):
        return replace(row, labels=row.tokens["input_ids"])


class TrainsAnotherWord(Broken):
    def spoil(self, row):
        labels = row.labels.clone()
        labels[-2] = 5
        return replace(row, labels=labels)


class TrainsNothingAfterTheWords(Broken):
    def spoil(self, row):
        labels = row.labels.clone()
        labels[(labels != IGNORE_INDEX).nonzero()[-1]] = IGNORE_INDEX
        return replace(row, labels=labels)


def test_the_processor_of_another_model_is_found_out(tiny_model, tiny_processor):
    """Both have tokens enough, but an image is written in another token than the model's."""
    model, collator = tiny_model("llava15"), ChatCollator(tiny_processor("llava15"))
    [row], _ = collator.encode([{**one(), "row": 5}])
    check_embedding([row], model)
    model.config.image_token_id = 7
    with pytest.raises(ValueError, match="row 5: no token of its image is 7, the model's image token; use the model's"):
        check_embedding([row], model)


@pytest.mark.parametrize("family", TEN)
def test_every_family_passes(family, tiny_model, tiny_processor):
    rows = [one(), two(), {"messages": [ask("2 + 2?"), answer("4")]}]
    collator, model = ChatCollator(tiny_processor(family)), tiny_model(family)
    report = audit(collator, rows)
    # LLaVA-1.5 writes earlier answers without a stop token, OneVision with another header than it prompts with.
    rewritten = {"llava15", "llava_onevision"} & {family}
    assert report.prompts == ({EQUAL: 3, REWRITTEN: 1} if rewritten else {EQUAL: 4})
    assert report.answers == {f"end with {LEARNED[family].stop!r}": 4}
    check_embedding(report.rows, model)
    assert "match the features" in check_forward(collator, report.shortest, model)


def test_counts_are_those_of_the_format_written_by_hand(tiny_processor):
    processor = tiny_processor("llava15")
    rows = [one("ℵ"), {"messages": [ask("Hi"), answer("ℵℵ")]}]
    report = audit(ChatCollator(processor), rows)
    texts = ["USER: <image>\nWhat is this? ASSISTANT: ℵ</s>", "USER: Hi ASSISTANT: ℵℵ</s>"]
    with_image, without = (
        len(processor(text=text, images=images)["input_ids"][0])
        for text, images in zip(texts, ([picture(40, 30)], None), strict=True)
    )
    # The space, three bytes for each letter, the stop token; 32 x 32 pixels in patches of 8 x 8.
    trained, image = (1 + 3 + 1) + (1 + 6 + 1), 16
    prompt = with_image + without - trained - image
    assert report.tokens == {"trained": trained, "prompt": prompt, "image": image}
    assert [len(row) for row in report.rows] == [with_image, without]
    assert f"{without} to {with_image} (row 0)" in str(report)
    assert "ℵ</s>" in str(report)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (WithoutBos, r"^row 3: the prompt of messages\[1\] has \d+ tokens \(0 BOS\), but \d+ \(1 BOS\) at inference"),
        (TrainsEverything, r"^row 3: \d+ tokens of no answer are trained, '<s> ?USER: <image>"),
        (TrainsAnotherWord, r"^row 3: messages\[1\] reads 'A cat.', but '.*' is trained"),
        (TrainsNothingAfterTheWords, r"^row 3: messages\[1\] is trained without a stop token"),
    ],
)
def test_a_collator_at_fault_is_named_with_its_row(broken, message, tiny_processor):
    with pytest.raises(ValueError, match=f"(?ms){message}") as error:
        audit(broken(tiny_processor("llava15")), [one() for _ in range(5)])
    assert str(error.value).startswith("faults in what would be trained: 1\n")


def test_a_template_that_shows_images_differently_at_inference(tiny_processor):
    """Training hands a template bare image parts, a user at inference parts that hold the image."""
    processor = tiny_processor("llava15")
    processor.chat_template = processor.chat_template.replace(r"'<image>\n'", r"'<image>' ~ '\n' * ('image' in part)")
    with pytest.raises(ValueError, match=r"row 1: the prompt of messages\[1\] .* from token \d+ on they read"):
        audit(ChatCollator(processor), [{"messages": [ask("Hi"), answer("Hello")]}, one()])


def test_bos_is_compared_where_the_history_cannot_be(tiny_processor):
    processor = tiny_processor("llava15")
    rows = [two() for _ in range(4)]
    assert audit(ChatCollator(processor, train_on="last_assistant"), rows).prompts == {REWRITTEN: 4}
    with pytest.raises(ValueError, match=r"row 3: the prompt of messages\[3\] .*0 BOS"):
        audit(WithoutBos(processor, train_on="last_assistant"), rows)


def test_a_first_prompt_has_no_excuse(tiny_processor):
    """OneVision prompts with another header than it writes, which must not hide a fault in a row of one turn."""
    with pytest.raises(ValueError, match=r"row 3: the prompt of messages\[1\]"):
        audit(WithoutBos(tiny_processor("llava_onevision")), [one() for _ in range(4)])


def test_a_template_that_wants_the_system_message_as_a_string(tiny_processor):
    processor = tiny_processor("llava15")
    processor.chat_template = processor.chat_template.replace(
        "{%- for turn in messages -%}",
        "{%- if messages[0]['role'] == 'system' -%}{{ messages[0]['content'] + ' ' }}{% set messages = messages[1:] %}"
        "{%- endif -%}{%- for turn in messages -%}",
        1,
    )
    row = one()
    row["messages"] = [{"role": "system", "content": "Be brief."}, *row["messages"]]
    report = audit(ChatCollator(processor), [row])
    assert report.rows[0].text.startswith("Be brief. USER: ")
    assert report.prompts == {EQUAL: 1}


def test_an_answer_cut_from_its_prompt(tiny_processor):
    """A line break at its start is trained as generated, though a longer prompt joins it with the one before it."""
    rows = [{"messages": [ask("Hi"), answer("\nTwo words"), ask("And?"), answer("4")]}]
    assert audit(ChatCollator(tiny_processor("qwen2_5_vl")), rows).prompts == {EQUAL: 2}


def test_an_image_with_fewer_tokens_where_more_images_follow(tiny_model, tiny_processor):
    """OneVision cuts a lone image into tiles, and no longer once there are two: no row can equal both."""
    messages = [ask(None, "What is this?"), answer("A cat."), ask(None, "And this?"), answer("A dog.")]
    row = {"messages": messages, "images": [picture(40, 30), picture(30, 40)]}
    collator = ChatCollator(tiny_processor("llava_onevision"))
    report = audit(collator, [row])
    assert report.prompts == {REWRITTEN: 2}
    assert "match the features" in check_forward(collator, report.rows[0], tiny_model("llava_onevision"))
    assert audit(collator, [one()]).prompts == {EQUAL: 1}


def test_an_answer_without_a_stop_token(tiny_processor):
    collator = ChatCollator(tiny_processor("llava15"), stop_token=None)
    with pytest.raises(ValueError, match=r"row 0: messages\[1\] is trained without a stop token"):
        audit(collator, [one()])
    assert audit(collator, [one()], require_stop_token=False).answers == {"end without a stop token": 1}


def test_a_stop_token_that_should_not_be_there(tiny_processor):
    """As when `stop_token=None` is deleted from a recipe for captions."""
    rows = [one(), one()]
    with pytest.raises(ValueError, match=r"trained: 2\nrow 0: messages\[1\] is trained with the stop token '</s>'.*"):
        audit(ChatCollator(tiny_processor("llava15")), rows, require_stop_token=False)
    with pytest.raises(ValueError, match=r"pass stop_token=None to ChatCollator"):
        audit(ChatCollator(tiny_processor("gemma3")), rows, require_stop_token=False)


def test_rows_without_anything_to_train_are_named_together(tiny_processor):
    rows = [one(), one(train=False), one(), one(train=False)]
    with pytest.raises(ValueError, match=r"trained: 2\nrow 1: no token is left.*\nrow 3: no token is left"):
        audit(ChatCollator(tiny_processor("llava15")), rows)


def test_a_refusal_of_the_collator_keeps_its_row(tiny_processor):
    with pytest.raises(ValueError, match=r"^row 1: .*'</s>' as text"):
        audit(ChatCollator(tiny_processor("llava15")), [one(), one("A cat.</s>")])


def test_no_rows(tiny_processor):
    with pytest.raises(ValueError, match="no rows"):
        audit(ChatCollator(tiny_processor("llava15")), [])


def shrink(model: Any, processor: Any) -> None:
    model.resize_token_embeddings(300)


def end_elsewhere(model: Any, processor: Any) -> None:
    model.generation_config.eos_token_id = [0, 1]


def count_other_patches(model: Any, processor: Any) -> None:
    processor.patch_size = 16


def spoil_weights(model: Any, processor: Any) -> None:
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (shrink, r"row 1: token \d+ is beyond the 300 tokens of the embedding"),
        (count_other_patches, "row 1: the model refuses it: Image features and image tokens do not match"),
        (spoil_weights, "row 1: the loss is nan"),
    ],
)
def test_a_model_that_does_not_fit_is_told_by_a_row(fault, message, tiny_model, tiny_processor):
    model, processor = tiny_model("llava15").train(), tiny_processor("llava15")
    model.model.vision_tower.eval()
    fault(model, processor)
    modes = [module.training for module in model.modules()]
    collator = ChatCollator(processor)
    report = audit(collator, [{"messages": [ask("Hi"), answer("Hello")]}, one()])
    assert report.shortest is report.rows[1]
    check = (
        partial(check_embedding, report.rows) if fault is shrink else partial(check_forward, collator, report.shortest)
    )
    with pytest.raises(ValueError, match=message):
        check(model)
    assert [module.training for module in model.modules()] == modes


def test_the_model_is_left_as_it_was(tiny_model, tiny_processor):
    """Also with adapters, in half precision but for the projector, under a collator that names its rows."""
    model, given = tiny_model("llava15", dtype=torch.bfloat16), {}
    model.model.multi_modal_projector.float()
    model.register_forward_pre_hook(
        lambda module, _, kwargs: given.update(kwargs, modes=(module.training, torch.is_grad_enabled())),
        with_kwargs=True,
    )
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*\.q_proj"))
    model.train()
    model.base_model.model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    collator = ChatCollator(tiny_processor("llava15"))
    [row], _ = collator.encode([one() | {"row": 5}])
    with torch.autocast("cpu", torch.bfloat16):  # as the Trainer wraps the forward
        assert "on row 5, its 16 image tokens match" in check_forward(collator, row, model)
    assert [module.training for module in model.modules()] == modes
    assert given["modes"] == (False, False)
    assert "pixel_values" in given
    assert "rows" not in given


def test_rows_are_spread_over_the_dataset(tiny_processor):
    collator = ChatCollator(tiny_processor("llava15"))

    def names(dataset: Any, num_rows: int) -> list[str]:
        return [row.name for row in audit(collator, dataset, num_rows=num_rows).rows]

    rows = [{"messages": [ask("Hi"), answer(str(n))]} for n in range(10)]
    assert names(rows, 4) == ["row 0", "row 2", "row 5", "row 7"]
    assert names(Dataset.from_list(rows), 64) == [f"row {n}" for n in range(10)]
    assert names(Dataset.from_list(rows).to_iterable_dataset(), 3) == ["row 0", "row 1", "row 2"]
    assert names([row | {"row": 70 + n} for n, row in enumerate(rows)], 2) == ["row 70", "row 75"]


def test_cut_answers_are_counted(tiny_processor):
    collator = ChatCollator(tiny_processor("llava15"), truncation="trim", max_length=60)
    report = audit(collator, [one(), one("A cat. " * 30)])
    assert report.answers == {"end with '</s>'": 1, "cut by max_length": 1}


def pieces(page: str, kind: str) -> list[tuple[str, str]]:
    """(text, hint) of each piece of a kind, as a browser shows it."""
    found = re.findall(rf'<span class="{kind}(?: special)?" data-hint="([^"]*)">(.*?)</span>', page, re.DOTALL)
    assert all(text == escape(unescape(text)) for _, text in found)
    return [(unescape(text).replace("↵\n", "\n"), hint) for hint, text in found]


@pytest.mark.parametrize("processor_of", [lambda: tiny.build("llava15")[1], lambda: families.build("idefics2")[1]])
def test_no_row_asks_for_all_added_tokens(processor_of, monkeypatch, tmp_path):
    """Gemma has 6,000, which take 17 ms, and a page has thousands of pieces. Idefics2 does not report what an image
    brings, so that it is looked for."""
    collator, asked = ChatCollator(processor_of()), []
    monkeypatch.setattr(type(collator.processor.tokenizer), "added_tokens_decoder", property(asked.append))
    write_audit_html(audit(collator, [one(), two()]), tmp_path / "audit.html")
    assert asked == []


@pytest.mark.parametrize("family", ["llava15", "smolvlm", "qwen2_5_vl", "gemma3"])
def test_page(family, tiny_processor, tmp_path):
    evil = '<script>alert("1")</script> & <b>日本語</b>\n"é🙂'
    messages = [ask(None, evil), answer(evil), ask("Hi"), answer("Yes", train=False)]
    report = audit(ChatCollator(tiny_processor(family)), [{"messages": messages, "images": [picture(500, 300)]}])
    path = tmp_path / "new" / "page.html"
    write_audit_html(report, path)
    page = path.read_text("utf-8")

    tags: list[tuple[str, dict[str, Any]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    assert not {tag for tag, _ in tags} & {"script", "link"}
    assert "<script" not in page
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "default-src 'none'" in page
    assert "http:" not in page
    [source] = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert Image.open(BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))).size == (250, 150)

    before, stop, _ = LEARNED[family]
    assert "".join(text for text, _ in pieces(page, "trained")) == before + evil + stop
    [row] = report.rows
    ids, places = row.tokens["input_ids"].tolist(), row.image.nonzero().flatten().tolist()
    [(chip, hint)] = pieces(page, "image")
    name, count = chip.rsplit(" x ", 1)
    most = max(set(ids[places[0] : places[-1] + 1]), key=ids[places[0] : places[-1] + 1].count)
    assert (name, int(count)) == (report.collator.processor.tokenizer.convert_ids_to_tokens(most), ids.count(most))
    assert hint.endswith(f"position {places[0]} to {places[-1]}")
    last = max(n for n, label in enumerate(row.labels.tolist()) if label != IGNORE_INDEX)
    assert pieces(page, "trained")[-1] == (stop, f"id {ids[last]} · position {last}")


def test_every_token_is_on_the_page(tiny_processor, tmp_path):
    report = audit(ChatCollator(tiny_processor("qwen2_5_vl")), [two()])
    write_audit_html(report, tmp_path / "page.html")
    shown = [
        piece for kind in ("prompt", "trained", "image") for piece in pieces((tmp_path / "page.html").read_text(), kind)
    ]
    places: list[int] = []
    for _, hint in shown:
        first, last = re.fullmatch(r"id .* · position (\d+)(?: to (\d+))?", hint).groups()
        places += range(int(first), int(last or first) + 1)
    assert sorted(places) == list(range(len(report.rows[0])))


def test_mask_in_the_terminal(tiny_processor):
    processor = tiny_processor("llava15")
    [row], _ = ChatCollator(processor).encode([one("A\x1b[2J é.")])
    image, question = "<image x 16>", "\nWhat is this? ASSISTANT:"
    drawn = draw_mask(row, processor.tokenizer, colour=False)
    assert drawn == f"<s>USER: {image}{question}[ A\\x1b[2J é.</s>]"
    assert draw_mask(row, processor.tokenizer) == drawn  # stderr is not a terminal here
    prompt, blue, green = "\033[2m{}\033[0m", f"\033[34m{image}\033[0m", "\033[32m A\\x1b[2J é.</s>\033[0m"
    coloured = draw_mask(row, processor.tokenizer, colour=True)
    assert coloured == prompt.format("<s>") + prompt.format("USER: ") + blue + prompt.format(question) + green
    assert "[ A\\x ... </s>]" in draw_mask(row, processor.tokenizer, width=8, colour=False)


def test_shared_characters_are_drawn_once(tiny_processor):
    for family in TEN:
        processor = tiny_processor(family)
        [row], _ = ChatCollator(processor).encode([two()])
        drawn = draw_mask(row, processor.tokenizer, width=10_000, colour=False)
        [first, second] = [text.split("]")[0] for text in drawn.split("[") if "Wide, tall." in text or "🙂" in text]
        assert first.strip() == f"Wide, tall.{LEARNED[family].stop}"
        assert second.strip() == f"日本語, é 🙂{LEARNED[family].stop}"


def test_family_table(capsys):
    table = runpy.run_path(str(FAMILY_TABLE))
    assert table["main"](["gemma3"]) == 0
    assert "| gemma3 | yes | `<end_of_turn>`, from the template | `<bos>` | yes | yes |" in capsys.readouterr().out


def show_images_differently(model: Any, processor: Any) -> None:
    processor.chat_template = processor.chat_template.replace(r"'<image>\n'", r"'<image>' ~ '\n' * ('image' in part)")


@pytest.mark.parametrize(
    ("fault", "cells"),
    [
        (spoil_weights, [False, False, False, True, True, False, False]),
        (count_other_patches, [False, False, False, True, False, False, False]),
        (end_elsewhere, [False, True, False, False, False, False, False]),
        (show_images_differently, [False, False, True, False, False, False, False]),
        (None, [True, False, True, False, False, False, False]),
    ],
)
def test_each_cell_of_the_family_table_can_fail(fault, cells, monkeypatch, tiny_model, tiny_processor, capsys):
    """A model, a processor, or (last) a collator at fault."""
    table = runpy.run_path(str(FAMILY_TABLE))["main"]
    model, processor = tiny_model("llava15"), tiny_processor("llava15")
    if fault:
        fault(model, processor)
    else:
        monkeypatch.setitem(table.__globals__, "ChatCollator", partial(ChatCollator, train_on="all"))
    monkeypatch.setattr(tiny, "build", lambda family: (model, processor))
    assert table(["llava15"]) == 1
    found = capsys.readouterr().out.splitlines()[-1].split(" | ")[1:]
    assert [cell.startswith("no: ") for cell in found] == cells


def test_a_row_of_several_answers_is_audited_as_the_rows_it_becomes() -> None:
    """Qwen3.5's template leaves out earlier thoughts, so that each answer is a row; the row beside it stays one."""
    report = audit(ChatCollator(tiny.build("qwen3_5")[1]), [two(), one()])
    assert [row.name for row in report.rows] == ["row 0", "row 0", "row 1"]
    assert sum(report.answers.values()) == sum(report.prompts.values()) == 3


@pytest.fixture
def in_two_processes(workers_asked: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Large images, on a machine of two cores: how many workers each audit took."""
    monkeypatch.setattr("vlm_sft.chat.audit.core_count", lambda: 2)
    monkeypatch.setattr("vlm_sft.chat.audit._WORTH_S", 0)
    return workers_asked


def test_other_processes_find_the_same(in_two_processes, monkeypatch, tiny_processor, tmp_path):
    collator = ChatCollator(tiny_processor("llava15"))
    rows = [one(f"{n} cats.") if n % 3 else two() for n in range(30)]
    rows[20] = one("x")
    state = random.getstate(), torch.get_rng_state().tolist()
    spread = audit(collator, rows)
    assert (random.getstate(), torch.get_rng_state().tolist()) == state
    monkeypatch.setattr("vlm_sft.chat.audit.core_count", lambda: 1)
    alone = audit(collator, rows)
    assert in_two_processes == [2]
    assert spread.facts() == alone.facts()
    assert str(spread) == str(alone)
    for report in (spread, alone):
        write_audit_html(report, tmp_path / "audit.html")
        assert [row.name for row in report.shortest_of_kinds] == ["row 0", "row 20"]
        assert [row.name for row in report.rows if row.conversation.images] == ["row 0", "row 20"]
        assert [len(each) for each in report.pictures] == [3, 1, 1] * 10
    for here, there in zip(spread.rows, alone.rows, strict=True):
        assert torch.equal(here.labels, there.labels)
        assert torch.equal(here.offsets, there.offsets)


@pytest.mark.parametrize("place", [1, 20])
def test_a_fault_is_named_the_same_in_another_process(place, in_two_processes, tiny_processor):
    collator = ChatCollator(tiny_processor("llava15"), max_length=60)
    rows = [one(f"{n} cats.") for n in range(30)]
    rows[place] = one("Very many cats. " * 30)
    with pytest.raises(ValueError, match=rf"^row {place}: \d+ tokens .* more than max_length=60") as raised:
        audit(collator, rows)
    assert any(frame.name == "_fit" for frame in raised.traceback)  # where it comes from
    assert in_two_processes == [2] * (place > 7)


@pytest.mark.parametrize("size", [(1, 20), (20, 1)])
def test_boxes_on_a_line_are_no_fault(size, tiny_processor):
    row = one("It is at [0.1, 0.2, 0.5, 0.9].") | {"images": [Image.new("RGB", size)]}
    [[(_, words)]] = audit(ChatCollator(tiny_processor("llava15")), [row]).pictures
    assert words == "1 boxes, read as 0-1"
