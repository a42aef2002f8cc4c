"""Labels hold the assistant's words and the stop token, exactly, on every family."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trl
from conversations import (
    BYTE_LEVEL,
    LEARNED,
    answer,
    ask,
    assert_as_in_full,
    examples,
    learned_text,
    picture,
    plain,
)
from families import TEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerFast

from vlm_sft import IGNORE_INDEX, ChatCollator, ChatTemplate
from vlm_sft.chat.audit import check_stops
from vlm_sft.chat.expansions import reading_runs_once
from vlm_sft.chat.messages import normalise, split_turns

FAMILIES = pytest.mark.parametrize("family", TEN)
FEW = ("llava15", "qwen2_5_vl", "gemma3")  # a processor of each kind
SOME_FAMILIES = pytest.mark.parametrize(
    "family", [name if name in FEW else pytest.param(name, marks=pytest.mark.sweep) for name in TEN]
)
PROPERTY = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def example() -> dict[str, Any]:
    messages = [ask(None, "What is this?"), answer("A cat."), ask("Sure?"), answer("Yes.")]
    return {"messages": messages, "images": [picture(40, 30)]}


def trained_text(row: Any) -> str:
    """The characters of the tokens that are trained, each once."""
    covered = {c for s, e in row.offsets[row.labels != IGNORE_INDEX].tolist() for c in range(s, e)}
    return "".join(row.text[c] for c in sorted(covered))


def trl_template(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


@SOME_FAMILIES
def test_random_conversations(family, tiny_processor, record_property):
    processor = tiny_processor(family)
    collator = ChatCollator(processor, reserved_tokens="escape")
    rows_seen = 0

    @PROPERTY
    @given(st.lists(examples(), min_size=1, max_size=3))
    def check(batch_of_examples):
        nonlocal rows_seen
        before = copy.deepcopy(batch_of_examples)
        rows, _ = collator.encode(batch_of_examples)
        batch = collator(batch_of_examples)
        assert [example["messages"] for example in batch_of_examples] == [example["messages"] for example in before]
        if rows_seen % 3 == 0:
            assert_as_in_full(collator, batch_of_examples)
        for number, (row, example) in enumerate(zip(rows, batch_of_examples, strict=True)):
            expected = plain(learned_text(family, example))
            ids = row.tokens["input_ids"]
            supervised = row.labels != IGNORE_INDEX
            if family in BYTE_LEVEL:
                assert plain(processor.tokenizer.decode(ids[supervised])) == expected
            else:
                assert plain(trained_text(row)) == expected
            assert (row.labels[supervised] == ids[supervised]).all()
            assert not (supervised & row.image).any()
            # In the batch: the same, then padding that is neither attended to nor trained.
            attended = batch["attention_mask"][number].bool()
            assert torch.equal(batch["labels"][number][attended], row.labels)
            assert (batch["labels"][number][~attended] == IGNORE_INDEX).all()
            rows_seen += 1

    check()
    record_property("conversations", rows_seen)


@FAMILIES
def test_line_breaks_that_are_added_tokens_are_trained(family, tiny_processor):
    """Also where a processor writes them round each image, as Gemma 3's does."""
    processor = copy.deepcopy(tiny_processor(family))
    processor.tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("\n\n\n", normalized=False)])
    row = {"messages": [ask(None, "What?"), answer("One.\n\nTwo.\n\n\nThree.")], "images": [picture(40, 30)]}
    collator = ChatCollator(processor)
    [found], _ = collator.encode([row])
    assert "One.\n\nTwo.\n\n\nThree." in trained_text(found)
    assert_as_in_full(collator, [row])


@FAMILIES
def test_image_tokens_are_features_and_the_model_learns(family, tiny_processor, tiny_model):
    """A real forward and backward on random batches: the model itself refuses another number of placeholders."""
    collator = ChatCollator(tiny_processor(family), reserved_tokens="escape")
    model = tiny_model(family)

    @settings(PROPERTY, max_examples=4)
    @given(st.lists(examples(), min_size=1, max_size=3))
    def check(batch):
        model.zero_grad()
        loss = model(**collator(batch)).loss
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    check()


@FAMILIES
def test_everything_but_padding_and_images(family, tiny_processor, example):
    processor = tiny_processor(family)
    other = {"messages": [ask("Hi"), answer("Hello")]}
    rows, _ = ChatCollator(processor, train_on="all").encode([example, other])
    for row in rows:
        assert torch.equal(row.labels == IGNORE_INDEX, row.image)
    text_only = rows[1]
    assert not text_only.image.any()
    # What an image brings is what differs from the same words without it.
    without = {"messages": [ask("What is this?"), *example["messages"][1:]]}
    bare = ChatCollator(processor, train_on="all").encode([without])[0][0].tokens["input_ids"]
    words = rows[0].labels[rows[0].labels != IGNORE_INDEX]
    specials = set(processor.tokenizer.added_tokens_decoder)
    assert [i for i in words.tolist() if i in specials] == [i for i in bare.tolist() if i in specials]


@FAMILIES
def test_padding_changes_nothing(family, tiny_processor, tiny_model, example):
    batch = [example, {"messages": [ask("Hi"), answer("Hello")]}]
    model, losses = tiny_model(family), []
    for multiple in (None, 64):
        inputs = ChatCollator(tiny_processor(family), pad_to_multiple_of=multiple)(batch)
        assert inputs["input_ids"].shape[1] % (multiple or 1) == 0
        with torch.no_grad():
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        labels = inputs["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        losses.append([row[label != IGNORE_INDEX] for row, label in zip(loss, labels, strict=True)])
    for less, more in zip(*losses, strict=True):
        assert (less - more).abs().max() < 1e-5


@FAMILIES
def test_prompt_is_what_inference_sees(family, tiny_processor, example):
    """The ids before the first trained token are those of the generation prompt, BOS included, once."""
    processor = tiny_processor(family)
    for text in ("A cat.", "\nA cat.", "\n\n  A cat"):  # line breaks would melt into the header of some templates
        messages = [example["messages"][0], answer(text)]
        [row], _ = ChatCollator(processor).encode([{"messages": messages, "images": example["images"]}])
        prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
        bos = processor.tokenizer.bos_token
        ids = processor(
            text=[prompt], images=[example["images"]], add_special_tokens=not (bos and prompt.startswith(bos))
        )["input_ids"][0]
        first = int((row.labels != IGNORE_INDEX).nonzero()[0])
        assert row.tokens["input_ids"][:first].tolist() == list(ids)
        if bos and family != "smolvlm":  # SmolVLM's BOS also opens the conversation
            assert list(ids).count(processor.tokenizer.bos_token_id) == 1


ORACLES = {
    family: f"{family}_training" for family in ("llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "gemma3")
}


@pytest.mark.parametrize("family", ORACLES)
def test_agrees_with_generation_marks(family, tiny_processor, example):
    """TRL marks the answers in its own copies of these templates; transformers turns the marks into a mask."""
    processor = tiny_processor(family)
    messages = [
        ask(None, "One?"),
        answer("It is 12."),
        ask("More", None),
        answer("日本語 and a dog"),
        ask("x"),
        answer("no"),
    ]
    pictures = [picture(40, 30), picture(60, 60, 1)]
    [row], _ = ChatCollator(processor).encode([{"messages": messages, "images": pictures}])
    with_images = copy.deepcopy(messages)
    parts = [part for message in with_images for part in message["content"] if part["type"] == "image"]
    for part, image in zip(parts, pictures, strict=True):
        part["image"] = image
    marked = processor.apply_chat_template(
        with_images,
        chat_template=trl_template(ORACLES[family]),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = marked["input_ids"][0], marked["assistant_masks"][0]
    assert row.tokens["input_ids"].tolist() == list(ids)
    ours = (row.labels != IGNORE_INDEX).tolist()
    for place, (own, theirs) in enumerate(zip(ours, mask, strict=True)):
        # TRL's marks of some templates hold the line break after the stop token as well.
        assert own == bool(theirs) or not processor.tokenizer.decode([ids[place]]).strip()


def test_llava15_is_the_original_format(tiny_processor):
    """`conv_vicuna_v1` of haotian-liu/LLaVA (llava/conversation.py) and the mask of its `preprocess_v1`, by hand."""
    system = "A chat between a curious human and an artificial intelligence assistant."
    messages = [
        {"role": "system", "content": system},
        *(ask(None, "What is this?"), answer("A cat."), ask("Sure?"), answer("Yes.")),
    ]
    [row], _ = ChatCollator(tiny_processor("llava15")).encode([{"messages": messages, "images": [picture(40, 30)]}])
    image = "<image>" * 16
    assert row.text == f"{system} USER: {image}\nWhat is this? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>"
    assert trained_text(row) == " A cat.</s> Yes.</s>"
    tokenizer = tiny_processor("llava15").tokenizer
    ids = row.tokens["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert (row.labels == tokenizer.eos_token_id).sum() == 2
    assert ids[-1] == row.labels[-1] == tokenizer.eos_token_id


# Text before the image, after it to the end of the prompt, trained text, what the template writes after that.
WRITTEN = {
    "llava15": ("USER: ", "\nHi ASSISTANT:", " Yo</s>", ""),
    "llava_next": ("[INST] ", "\nHi [/INST]", " Yo</s>", " "),
    "llava_onevision": ("<|im_start|>user ", "\nHi<|im_end|><|im_start|>assistant\n", "Yo<|im_end|>", ""),
    "qwen2_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>",
        "<|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n",
        "Yo<|im_end|>",
        "\n",
    ),
    "qwen3_vl": (
        "<|im_start|>user\n<|vision_start|>",
        "<|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n",
        "Yo<|im_end|>",
        "\n",
    ),
    "smolvlm": ("<|im_start|>User:", "Hi<end_of_utterance>\nAssistant:", " Yo<end_of_utterance>", "\n"),
    "idefics3": ("<|begin_of_text|>User:", "Hi<end_of_utterance>\nAssistant:", " Yo<end_of_utterance>", "\n"),
    "gemma3": ("<bos><start_of_turn>user\n", "Hi<end_of_turn>\n<start_of_turn>model\n", "Yo<end_of_turn>", "\n"),
    "internvl": ("<|im_start|>user\n", "\nHi<|im_end|>\n<|im_start|>assistant\n", "Yo<|im_end|>", "\n"),
}
WRITTEN["qwen2_5_vl"] = WRITTEN["qwen2_vl"]


@FAMILIES
def test_one_exchange_by_hand(family, tiny_processor):
    [row], _ = ChatCollator(tiny_processor(family)).encode(
        [{"messages": [ask(None, "Hi"), answer("Yo")], "images": [picture(30, 30)]}]
    )
    before, prompt, trained, after = WRITTEN[family]
    first = int((row.labels != IGNORE_INDEX).nonzero()[0])
    start = int(row.offsets[first, 0])
    assert row.text.startswith(before)
    assert row.text[:start].endswith(prompt)
    assert row.text[start:] == trained + after
    assert trained_text(row) == trained


def test_which_answers_are_trained(tiny_processor, example):
    processor = tiny_processor("llava15")

    def trained(messages: list[dict[str, Any]], **settings: Any) -> str:
        [row], _ = ChatCollator(processor, **settings).encode([{"messages": messages, "images": example["images"]}])
        return trained_text(row)

    messages = example["messages"]
    assert trained(messages) == " A cat.</s> Yes.</s>"
    assert trained(messages, train_on="last_assistant") == " Yes.</s>"
    assert trained([messages[0], answer("A cat.", train=False), *messages[2:]]) == " Yes.</s>"
    assert trained([messages[0], answer("A cat.", train=None), *messages[2:]]) == " A cat.</s> Yes.</s>"
    with pytest.raises(ValueError, match="example 0 of the batch: no token is left to train on"):
        ChatCollator(processor)([{"messages": [ask("Hi"), answer("Yo", train=False)]}])


def test_blank_answers_teach_to_stop(tiny_processor):
    for family in TEN:
        before, stop, trims = LEARNED[family]
        for text in ("", " ", "\n"):
            [row], _ = ChatCollator(tiny_processor(family)).encode([{"messages": [ask("Hi"), answer(text)]}])
            assert trained_text(row) == before + ("" if trims else text) + stop


def test_no_stop_token_on_request(tiny_processor, example):
    [row], _ = ChatCollator(tiny_processor("llava15"), stop_token=None).encode([example])
    assert "</s>" not in row.text
    assert trained_text(row) == " A cat. Yes."
    chosen = ChatCollator(tiny_processor("llava15"), stop_token="<pad>")
    [row], _ = chosen.encode([example])
    assert trained_text(row) == " A cat.<pad> Yes.<pad>"
    assert chosen.template.stops == ("<pad>",)


def test_padding_that_is_also_the_stop_token(tiny_processor):
    processor = copy.deepcopy(tiny_processor("llava15"))
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    collator, rows = ChatCollator(processor), [{"messages": [ask("Hi"), answer("a " * n)]} for n in (1, 9)]
    batch = collator(rows)
    assert ((batch["labels"] == processor.tokenizer.eos_token_id).sum(1) == 1).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(row) for row in collator.encode(rows)[0]]


def template_of(written: str) -> str:
    """A chat template that writes each message as `written` says of its `text` and `role`."""
    return (
        "{%- for message in messages -%}{%- set role = message['role'] -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}<image>{%- else -%}{%- set text = part['text'] -%}"
        + written
        + "{%- endif -%}{%- endfor -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'A: ' }}{%- endif -%}"
    )


def test_an_answer_ends_with_the_last_token_that_the_template_writes_after_it(tiny_processor):
    processor = copy.deepcopy(tiny_processor("llava15"))
    processor.chat_template = template_of("{{ 'A: ' + text + '</s><pad>' if role == 'assistant' else 'U: ' + text }}")
    [row], _ = ChatCollator(processor).encode([{"messages": [ask("Hi"), answer("Yes."), ask("Oh"), answer("No.")]}])
    assert trained_text(row) == "Yes.</s><pad>No.</s><pad>"
    assert [turn.stop for turn in row.turns] == ["<pad>", "<pad>"]
    ends = processor.tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "a"])
    assert ChatCollator(processor).template.stop_ids(SimpleNamespace(eos_token_id=ends[2])) == sorted(ends)


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_template_that_repeats_a_text_is_refused(role, tiny_processor):
    processor = copy.deepcopy(tiny_processor("llava15"))
    collator = ChatCollator(processor)
    twice = "{{ ('A: ' if role == 'assistant' else 'U: ') + text + (text if role == 'ROLE' else '') }}"
    processor.chat_template = template_of(twice.replace("ROLE", role))
    with pytest.raises(ValueError, match=rf"does not write the text of messages\[\d\] \({role}\) as it is"):
        collator([{"messages": [ask("Hi"), answer("Yes.")]}])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{{ start }}{{ '' if 'odd' in text else text }}", "does not write the text"),
        ("{{ start }}{{ text }}{{ text if 'odd' in text }}", "does not write the text"),
        ("{{ start | replace('A', 'B' if 'odd' in text else 'A') }}{{ text }}", "renders this answer"),
    ],
)
def test_what_a_template_does_to_one_text_is_seen_after_others_of_the_same_shape(written, said, tiny_processor):
    processor = copy.deepcopy(tiny_processor("llava15"))
    processor.chat_template = template_of("{%- set start = 'A: ' if role == 'assistant' else 'U: ' -%}" + written)
    collator = ChatCollator(processor)
    rows = [{"messages": [ask("Hi"), answer(text), ask("Oh"), answer(text)]} for text in ("Yes.", "An odd one.")]
    collator(rows[:1])
    with pytest.raises(ValueError, match=rf"example 1 of the batch: .*{said}"):
        collator(rows)


@pytest.mark.parametrize(
    "change", ["text.split() | join(' ')", "text | replace('\n', ' ')", "text | e", "text | lower"]
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_template_that_rewrites_a_text_is_refused_where_it_does(change, role, tiny_processor):
    processor = copy.deepcopy(tiny_processor("llava15"))
    written = f"{{{{ 'A: ' if role == 'assistant' else 'U: ' }}}}{{{{ ({change}) if role == '{role}' else text }}}}"
    processor.chat_template = template_of(written)
    collator = ChatCollator(processor)
    collator([{"messages": [ask("hi"), answer("yes.")]}])
    text = "| A & B |\n|---|\n| 1  | 2 |"
    with pytest.raises(ValueError, match=rf"does not write the text of messages\[\d\] \({role}\) as it is"):
        collator([{"messages": [ask(text), answer(text)]}])


def test_a_prompt_that_depends_on_a_text_is_seen_after_others_of_the_same_shape(tiny_processor):
    processor = copy.deepcopy(tiny_processor("llava15"))
    written = template_of("{{ 'A: ' if role == 'assistant' else 'U: ' }}{{ text }}")
    odd = "'odd' in messages[0]['content'][0]['text']"
    processor.chat_template = written.replace("{{ 'A: ' }}", f"{{{{ 'B: ' if {odd} else 'A: ' }}}}")
    collator = ChatCollator(processor)
    collator([{"messages": [ask("Hi"), answer("Yes.")]}])
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template renders this answer differently"):
        collator([{"messages": [ask("An odd one"), answer("Yes.")]}])


def image_token(tokenizer: dict[str, Any]) -> Any:
    return next(token for token in tokenizer["added_tokens"] if token["content"] == "<image>")


def an_unknown_token(tokenizer: dict[str, Any]) -> None:
    """Words become it as well, so that runs cannot be told from the text."""
    tokenizer["model"] |= {"unk_token": "<image>", "byte_fallback": False}
    tokenizer["model"]["vocab"]["<image>"] = image_token(tokenizer)["id"]


def an_end_token(tokenizer: dict[str, Any]) -> None:
    tokenizer["post_processor"]["single"].append({"SpecialToken": {"id": "<s>", "type_id": 0}})


def white_space(tokenizer: dict[str, Any]) -> None:
    """Which the last image token of a run takes."""
    image_token(tokenizer)["rstrip"] = True


@pytest.mark.parametrize("change", [an_unknown_token, an_end_token, white_space])
def test_runs_of_an_image_token_are_read_once_whatever_the_tokenizer_does(change, tiny_processor):
    processor = copy.deepcopy(tiny_processor("llava15"))
    changed = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    change(changed)
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(changed)), **processor.tokenizer.special_tokens_map
    )
    run = "<image>" * 9
    texts = [f"{run} What is 猫?<image>{run}", f"USER: 猫{run}\n{run} \n{run}", "No picture, 猫."]
    options = {"padding": True, "padding_side": "right", "return_offsets_mapping": True}
    expected = processor.tokenizer(texts, **options)
    found = reading_runs_once(ChatCollator(processor).template).tokenizer(texts, **options)
    assert {key: np.array(value).tolist() for key, value in found.items()} == {
        key: np.array(value).tolist() for key, value in expected.items()
    }


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
            "TimeoutError: it did not end",
        ),
        ("{% for a in range(1) %}x", "Unexpected end of template"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'|undefined"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ range(10 ** 9) | list }}", "OverflowError: Range too big"),
    ],
)
def test_a_hostile_template_is_named_and_stopped(template, said, tiny_processor, monkeypatch):
    monkeypatch.setattr("vlm_sft.chat.template._LIMIT_S", 0.3)
    processor = copy.deepcopy(tiny_processor("llava15"))
    processor.chat_template = template
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"the chat template fails with .*({said})"):
        ChatCollator(processor)
    assert time.monotonic() - began < 5
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_template_that_some_text_keeps_from_ending_is_stopped_however_it_is_rendered(tiny_processor, monkeypatch):
    """In each of the ways to hand it the messages, the first of which may be refused by another template."""
    monkeypatch.setattr("vlm_sft.chat.template._LIMIT_S", 0.3)
    processor = copy.deepcopy(tiny_processor("llava15"))
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
    processor.chat_template += "{% if 'slow' in messages[0] | string %}" + loop + "{% endif %}"
    collator = ChatCollator(processor)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"row 3: the chat template .*it did not end within 0\.3 seconds"):
            collator([{"messages": [ask("slow"), answer("Yes.")], "row": 3}])
        assert 0.8 < time.monotonic() - began < 5  # three ways
        assert len(collator([{"messages": [ask("fast"), answer("Yes.")], "row": 4}])["labels"]) == 1
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_batch_without_images_gets_a_blank_one_that_weighs_nothing(tiny_processor):
    collator = ChatCollator(tiny_processor("llava15"), image_in_every_batch=True)
    words = {"messages": [ask("Hi"), answer("Yes.")], "row": 7}
    seen = {"messages": [ask(None, "Hi"), answer("Yes.")], "images": [picture(30, 30)], "row": 8}
    for rows in ([words, seen], [seen, words], [seen]):
        assert collator(rows)["rows"].tolist() == [row["row"] for row in rows]
    batch = collator([words, words])
    assert batch["rows"].tolist() == [7, 7, -1]
    assert len(batch["pixel_values"]) == 1
    assert (batch["labels"][:2] != IGNORE_INDEX).any(1).all()
    assert (batch["labels"][2] == IGNORE_INDEX).all()
    assert len(collator.with_settings(image_in_every_batch=False)([words])["input_ids"]) == 1


def test_images_by_index_inline_and_nested(tiny_processor):
    processor = tiny_processor("llava15")
    one, two = picture(40, 30, 1), picture(40, 30, 2)
    reference = ChatCollator(processor)([{"messages": [ask("a", None, None), answer("b")], "images": [two, one]}])
    for images, parts in (
        ([one, two], [{"type": "image", "index": 1}, {"type": "image", "index": 0}]),
        (None, [{"type": "image", "image": two}, {"type": "image", "image": one}]),
        ([[two], [one]], [{"type": "image"}, {"type": "image"}]),
    ):
        messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, *parts]}, answer("b")]
        batch = ChatCollator(processor)([{"messages": messages, "images": images}])
        assert torch.equal(batch["pixel_values"], reference["pixel_values"])
        assert torch.equal(batch["labels"], reference["labels"])


@FAMILIES
def test_survives_pickling(family, tiny_processor, example):
    collator = ChatCollator(tiny_processor(family))
    copied = pickle.loads(pickle.dumps(collator))
    for key, value in collator([example]).items():
        assert torch.equal(copied([example])[key], value)


def test_keeps_what_the_model_needs(tiny_processor, example):
    assert "mm_token_type_ids" in ChatCollator(tiny_processor("qwen2_5_vl"))([example])
    assert "token_type_ids" in ChatCollator(tiny_processor("gemma3"))([example])


@FAMILIES
def test_truncation(family, tiny_processor, tiny_model, example):
    processor = tiny_processor(family)
    long = {**example, "row": 17}
    whole = ChatCollator(processor).encode([long])[0][0]
    first_answer = ChatCollator(processor).encode([{**example, "messages": example["messages"][:2]}])[0][0]
    with pytest.raises(ValueError, match=rf"row 17: {len(whole)} tokens .* more than max_length={len(whole) - 1}"):
        ChatCollator(processor, max_length=len(whole) - 1)([long])
    trim = {"truncation": "trim"}
    # The last exchange goes first, whole; then the tail of the answer that is left, its stop token with it.
    assert len(ChatCollator(processor, max_length=len(whole) - 1, **trim).encode([long])[0][0]) == len(first_answer)
    needed = int((first_answer.labels != IGNORE_INDEX).nonzero()[0]) + 1
    [cut], inputs = ChatCollator(processor, max_length=needed, **trim).encode([long])
    assert len(cut) == needed
    assert (cut.labels != IGNORE_INDEX).sum() == 1
    assert processor.tokenizer.convert_tokens_to_ids(LEARNED[family].stop) not in cut.labels
    assert (
        tiny_model(family)(
            **inputs,
            input_ids=cut.tokens["input_ids"][None],
            **{key: value[None] for key, value in cut.tokens.items() if key != "input_ids"},
        )
        .logits.isfinite()
        .all()
    )
    with pytest.raises(ValueError, match="row 17: its first question with its images takes"):
        ChatCollator(processor, max_length=needed - 1, **trim)([long])


def test_trimmed_images_leave_with_their_exchange(tiny_processor):
    messages = [ask(None, "a"), answer("b"), ask(None, "c"), answer("d" * 50)]
    example = {"messages": messages, "images": [picture(30, 30, 1), picture(30, 30, 2)]}
    short = {"messages": [ask("x"), answer("y")]}
    batch = ChatCollator(tiny_processor("llava15"), max_length=60, truncation="trim")([example, short])
    assert len(batch["pixel_values"]) == 1


def test_a_trim_keeps_all_exchanges_that_fit(tiny_processor):
    turns = [ask(None, "a"), answer("b"), ask("c"), answer("d"), ask("e"), answer("f")]
    collator = ChatCollator(tiny_processor("llava15"), truncation="trim")

    def encoded(count: int, limit: int | None) -> Any:
        example = {"messages": turns[:count], "images": [picture(30, 30)]}
        return collator.with_settings(max_length=limit).encode([example])[0][0]

    for kept in (2, 4, 6):
        whole = encoded(kept, None)
        for limit in (len(whole), len(whole) + 1):
            assert torch.equal(encoded(6, limit).tokens["input_ids"], whole.tokens["input_ids"])


def test_a_row_that_just_fits_is_whole_and_a_multiple_of_what_is_asked(tiny_processor, example):
    whole = ChatCollator(tiny_processor("llava15"))([example])
    found = ChatCollator(tiny_processor("llava15"), max_length=whole["input_ids"].shape[1])([example])
    assert torch.equal(found["labels"], whole["labels"])
    for multiple in (8, 64):
        padded = ChatCollator(tiny_processor("llava15"), pad_to_multiple_of=multiple)([example, example])
        length = padded["input_ids"].shape[1]
        assert length % multiple == 0
        assert 0 <= length - whole["input_ids"].shape[1] < multiple
        assert int(padded["attention_mask"].sum()) == 2 * whole["input_ids"].shape[1]


@pytest.mark.parametrize("stop_token", ["auto", None])  # without one, no added token stands after the change
def test_a_processor_that_changes_the_text_without_reporting_is_refused(
    stop_token, tiny_processor, example, monkeypatch
):
    processor = copy.deepcopy(tiny_processor("llava15"))
    collator, plain_call = ChatCollator(processor, stop_token=stop_token), type(processor).__call__

    def call(self: Any, text: Any = None, **options: Any) -> Any:
        return plain_call(self, text=[each.replace("Yes.", "Yes, I am.") for each in text], **options)

    monkeypatch.setattr(type(processor), "__call__", call)
    with pytest.raises(ValueError, match="LlavaProcessor adds text that it does not report"):
        collator([example])


def test_a_trim_cuts_no_image_also_where_all_is_trained(tiny_processor):
    collator = ChatCollator(tiny_processor("llava15"), truncation="trim", train_on="all")
    example = {"messages": [ask("Look at this: " * 4, None), answer("b")], "images": [picture(30, 30)]}
    [row] = collator.encode([example])[0]
    last = int(row.image.nonzero().max())
    assert len(collator.with_settings(max_length=last + 1).encode([example])[0][0]) == last + 1
    with pytest.raises(ValueError, match=rf"its first question with its images takes {last} tokens"):
        collator.with_settings(max_length=last)([example])


def test_reserved_tokens_in_text(tiny_processor):
    for family in TEN:
        processor = tiny_processor(family)
        stop, image = LEARNED[family].stop, processor.image_token
        for typed in (stop, image, processor.tokenizer.bos_token or stop):
            row = {"messages": [ask(f"what is {typed}"), answer(f"it is {typed}.")], "row": 3}
            with pytest.raises(ValueError, match=r"row 3: messages\[0\] \(user\) holds '"):
                ChatCollator(processor)([row])
            [encoded], _ = ChatCollator(processor, reserved_tokens="escape").encode([row])
            bare = {"messages": [ask("what is it"), answer("it is.")]}
            [reference], _ = ChatCollator(processor).encode([bare])
            specials = torch.tensor(sorted(processor.tokenizer.all_special_ids))
            count = torch.isin(encoded.tokens["input_ids"], specials).sum()
            assert count == torch.isin(reference.tokens["input_ids"], specials).sum()
            assert plain(trained_text(encoded)) == plain(f"{LEARNED[family].before}it is {typed}.{stop}")


def test_reserved_token_formed_by_two_parts(tiny_processor):
    row = {"messages": [ask("<|im_", "end|>"), answer("x")]}
    with pytest.raises(ValueError, match=r"holds '<\|im_end\|>' as text"):
        ChatCollator(tiny_processor("qwen2_5_vl"))([row])


def test_thinking_template_is_refused_or_split(tiny_processor):
    """Qwen3.5's template drops the thinking block of earlier answers, so they are not what the prompt asks for."""
    processor = copy.deepcopy(tiny_processor("qwen3_vl"))
    processor.chat_template = trl_template("qwen3_5_think")
    example = {"messages": [ask(None, "a"), answer("one"), ask("b"), answer("two")], "images": [picture(40, 40)]}
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template renders this answer differently"):
        ChatCollator(processor)([example])
    collator = ChatCollator(processor, train_on="last_assistant")
    pieces = split_turns(normalise(**example))
    rows, _ = collator.encode([piece._asdict() for piece in pieces])
    assert [trained_text(row)[-13:] for row in rows] == ["one<|im_end|>", "two<|im_end|>"]
    assert all("</think>" in trained_text(row) for row in rows)


def test_template_that_drops_text_is_refused(tiny_processor):
    processor = copy.deepcopy(tiny_processor("llava15"))
    processor.chat_template = processor.chat_template.replace(
        "{%- for turn in messages -%}", ("{%- for turn in messages if turn['role'] != 'system' -%}")
    )
    messages = [{"role": "system", "content": "Be brief."}, ask("a"), answer("b")]
    with pytest.raises(ValueError, match=r"does not write the text of messages\[0\] \(system\)"):
        ChatCollator(processor)([{"messages": messages}])


def test_system_message_where_the_template_refuses_it(tiny_processor):
    messages = [{"role": "system", "content": "Be brief."}, ask("a"), answer("b")]
    processor = copy.deepcopy(tiny_processor("llava15"))
    processor.chat_template = (
        "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
        + (processor.chat_template)
    )
    with pytest.raises(ValueError, match=r"refuses the conversation: no system.*first user message"):
        ChatCollator(processor)([{"messages": messages}])


def test_stop_token_is_where_generation_ends(tiny_processor, tiny_model, example):
    for family in TEN:
        collator = ChatCollator(tiny_processor(family))
        check_stops(collator, collator.encode([example])[0], tiny_model(family).generation_config)
    collator = ChatCollator(tiny_processor("llava15"))
    rows, _ = collator.encode([example | {"row": 7}])
    for ends in (5, [5]):
        with pytest.raises(ValueError, match=r"^row 7: .*to stop with '</s>' \(id 2\), but generation ends at \[5\]"):
            check_stops(collator, rows, SimpleNamespace(eos_token_id=ends))
    with pytest.raises(ValueError, match=r"eos_token_id = \[2\]"):
        check_stops(collator, rows, SimpleNamespace(eos_token_id=None))


def test_settings_are_checked_at_once(tiny_processor):
    with pytest.raises(ValueError, match=r"train_on='answers'.*truncation='cut'.*max_length=0"):
        ChatCollator(tiny_processor("llava15"), train_on="answers", truncation="cut", max_length=0)
    told = (
        r"padding_free='no' \(one of True, False\); name_rows=None .*; "
        r"image_in_every_batch='yes' \(one of True, False, None\)$"
    )
    with pytest.raises(ValueError, match=told):
        ChatCollator(tiny_processor("llava15"), padding_free="no", name_rows=None, image_in_every_batch="yes")
    for taken in (True, False, None):
        assert (
            ChatCollator(tiny_processor("llava15"), image_in_every_batch=taken).settings.image_in_every_batch is taken
        )
    for token in ("<nope>", "▁a"):  # the second one is in the vocabulary, and melts into the text before it
        with pytest.raises(ValueError, match=f"stop_token='{token}' is not an added token"):
            ChatCollator(tiny_processor("llava15"), stop_token=token)
    with pytest.raises(ValueError, match=r"itself writes '<\|im_end\|>' after an answer"):
        ChatCollator(tiny_processor("qwen2_5_vl"), stop_token="<|endoftext|>")


def test_processors_without_a_chat_are_refused(tiny_processor):
    processor = copy.deepcopy(tiny_processor("llava15"))
    processor.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template.*suffix"):
        ChatCollator(processor)
    with pytest.raises(ValueError, match="is not an image-text processor"):
        ChatCollator(tiny_processor("llava15").tokenizer)


@pytest.mark.parametrize("family", ["llava15", "qwen2_5_vl", "smolvlm", "gemma3"])
def test_processor_that_hides_its_replacements(family, tiny_processor):
    """They are found from the tokens, and proven; text that is slipped in is found out."""
    slipped = ""

    class Silent(type(tiny_processor(family))):
        def __call__(self, *args, **kwargs):
            kwargs["text"] = [text.replace("?", f"?{slipped}") for text in kwargs["text"]]
            output = super().__call__(*args, **kwargs)
            output.pop("text_replacement_offsets", None)
            return output

    plain, processor = ChatCollator(tiny_processor(family)), copy.deepcopy(tiny_processor(family))
    processor.__class__ = Silent
    collator = ChatCollator(processor)
    rows = [
        {"messages": [ask(None, "And?"), answer("One.")], "images": [picture(40, 30)]},
        {"messages": [ask(None, None, "Both?"), answer("Two.")], "images": [picture(30, 30), picture(64, 32)]},
        {"messages": [ask("Hi?"), answer("No."), ask("See?", None), answer("Yes.")], "images": [picture(20, 30)]},
    ]
    if family in ("smolvlm", "gemma3"):  # which write line breaks among the tokens of an image, or next to them
        with pytest.raises(ValueError, match="Silent does not report what it writes in the place of an image"):
            collator(rows)
        return
    expected, found = plain(rows), collator(rows)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    slipped = " (brief)"
    with pytest.raises(ValueError, match="example 0 of the batch: Silent does not report what it writes in the pla"):
        collator(rows)


def test_processor_that_adds_text_it_does_not_report_is_refused(tiny_processor):
    class Adding(type(tiny_processor("qwen2_5_vl"))):
        def __call__(self, *args, **kwargs):
            kwargs["text"] = [f"Note: {text}" for text in kwargs["text"]]
            output = super().__call__(*args, **kwargs)
            return output

    processor = copy.deepcopy(tiny_processor("qwen2_5_vl"))
    processor.__class__ = Adding
    collator = ChatCollator(processor)
    with pytest.raises(ValueError, match="row 3: Adding adds text that it does not report"):
        collator([{"row": 3, "messages": [ask("a"), answer("b")]}])


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"type": "video", "video": "a.mp4"}, "is a part of the kind 'video'"),
        ({"type": "audio", "audio": "a.wav"}, "is a part of the kind 'audio'"),
        ({"type": "video_url", "video_url": {"url": "a"}}, "is a part of the kind 'video_url'"),
        ({"type": "input_audio", "input_audio": {}}, "is a part of the kind 'input_audio'"),
        ({"video": "a.mp4"}, "is a part of the kind 'video'"),
        ({"type": "text", "text": "<video>What?"}, "holds '<video>'"),
        ({"type": "text", "text": "<audio>What?"}, "holds '<audio>'"),
    ],
)
@pytest.mark.parametrize("family", ["llava15", "qwen2_5_vl", "internvl"])
def test_video_and_sound_are_refused_by_name(family, part, found, tiny_processor):
    rows = [{"row": 4, "messages": [{"role": "user", "content": [part]}, answer("b")]}]
    with pytest.raises(ValueError, match=rf"row 4: messages\[0\].*{found}: video and sound are not trained on"):
        ChatCollator(tiny_processor(family))(rows)


def test_bad_rows_are_named(tiny_processor):
    collator = ChatCollator(tiny_processor("llava15"))
    good = {"messages": [ask("a"), answer("b")]}
    with pytest.raises(ValueError, match=r"row 41: 2 images but the messages hold 1 image parts"):
        collator([good, {"row": 41, "messages": [ask(None), answer("b")], "images": [picture(9, 9)] * 2}])
    with pytest.raises(ValueError, match="example 1 of the batch: no field 'messages' among 'text'"):
        collator([good, {"text": "a"}])
    with pytest.raises(ValueError, match=r"example 0 of the batch: messages\[1\] is from user; expected assistant"):
        collator([{"messages": [ask("a"), ask("b")]}])


def test_settings_are_frozen_and_changed_by_a_copy(tiny_processor, example):
    kwargs = {"documents": []}
    collator = ChatCollator(tiny_processor("llava15"), max_length=9, chat_template_kwargs=kwargs)
    for assign in (lambda: setattr(collator, "settings", None), lambda: setattr(collator.settings, "train_on", "all")):
        with pytest.raises(AttributeError):
            assign()
    longer = collator.with_settings(max_length=90)
    assert (collator.settings.max_length, longer.settings.max_length) == (9, 90)
    assert longer.with_settings(max_length=9).settings == collator.settings
    assert longer.processor is collator.processor
    assert (longer.template.kwargs, longer.template.stop_token) == (kwargs, "auto")
    with pytest.raises(TypeError, match="trian_on"):
        ChatCollator(collator.processor, trian_on="all")


def test_a_keyword_that_the_chat_template_does_not_read_is_refused(tiny_processor):
    processor = tiny_processor("qwen3_5")
    told = (
        r"does not read 'enable_thinkng' \(did you mean 'enable_thinking'\?\); it reads .*enable_thinking.*: give one"
    )
    with pytest.raises(ValueError, match=told):
        ChatCollator(processor, chat_template_kwargs={"enable_thinkng": False})
    for taken in ({"enable_thinking": False}, {"tools": None}, {"chat_template": processor.chat_template}):
        ChatCollator(processor, chat_template_kwargs=taken)
    for reads in (
        "{% set tone = tone | default(1) %}{{ tone }}",
        "{% if not tone is defined %}{% set tone = 1 %}{% endif %}",
        "{% generation %}{{ tone }}{% endgeneration %}",  # a tag of transformers' own
        "{% if %}",  # cannot be parsed: rendering says so
    ):
        ChatTemplate(processor, {"chat_template": reads, "tone": "kind"})
    with pytest.raises(ValueError, match="fails with Expected an expression"):
        ChatCollator(processor, chat_template_kwargs={"chat_template": "{% if %}", "tone": "kind"})
    with pytest.raises(ValueError, match="does not read 'tone'; it reads messages: give one of these, or leave it out"):
        ChatTemplate(processor, {"chat_template": "{% set tone = 1 %}{{ messages }}", "tone": 2})


def test_rows_are_named_where_all_have_a_number(tiny_processor, example):
    collator = ChatCollator(tiny_processor("llava15"))
    assert collator([example | {"row": 4}, example | {"row": 2}])["rows"].tolist() == [4, 2]
    assert "rows" not in collator([example | {"row": 4}, example])
    assert "rows" not in collator.with_settings(name_rows=False)([example | {"row": 4}])


def exchange_two_tokens(tokenizer: Any) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    one, other = "ab"
    vocab = model["vocab"] | {one: model["vocab"][other], other: model["vocab"][one]}
    tokenizer.backend_tokenizer.model = BPE(vocab, [tuple(merge) for merge in model["merges"]])


def test_fingerprint_tells_what_changes_a_row(tiny_processor, example):
    def of(change: Any = None, **settings: Any) -> str:
        processor = tiny_processor("llava15")
        if change is not None:
            change(processor)
        return ChatCollator(processor, **settings).fingerprint()

    same = [
        of(),
        of(max_length=9, truncation="trim"),
        of(padding_free=True),
        of(pad_to_multiple_of=8),
        of(name_rows=False),
    ]
    assert len(set(same)) == 1
    used = ChatCollator(tiny_processor("llava15"))
    used([example, {"messages": [ask("Hi"), answer("Hello")]}])  # the tokenizer remembers how it padded last
    assert used.fingerprint() == of()
    different = [
        of(),
        of(train_on="all"),
        of(stop_token=None),
        of(reserved_tokens="escape"),
        of(chat_template_kwargs={"documents": []}),
        of(lambda processor: setattr(processor, "chat_template", processor.chat_template + "\n")),
        of(lambda processor: setattr(processor, "patch_size", 16)),
        of(lambda processor: setattr(processor.image_processor, "do_normalize", False)),
        of(lambda processor: processor.tokenizer.add_tokens(["<new>"])),
        of(lambda processor: setattr(processor.tokenizer, "eos_token", "<pad>")),
        of(lambda processor: setattr(processor.tokenizer.backend_tokenizer, "normalizer", Lowercase())),
        of(lambda processor: exchange_two_tokens(processor.tokenizer)),
        type("Other", (ChatCollator,), {})(tiny_processor("llava15")).fingerprint(),
    ]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.add_tokens(["<new>"]),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("<image>", lstrip=True)]),
        lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", Lowercase()),
        lambda tokenizer: setattr(tokenizer.backend_tokenizer, "pre_tokenizer", Whitespace()),
        lambda tokenizer: setattr(tokenizer.backend_tokenizer, "post_processor", ByteLevel()),
        lambda tokenizer: setattr(tokenizer.backend_tokenizer, "decoder", Fuse()),
        lambda tokenizer: setattr(tokenizer, "_tokenizer", copy.deepcopy(tokenizer.backend_tokenizer)),
        exchange_two_tokens,
    ],
)
def test_the_tokenizer_is_written_out_again_only_where_it_changes(change, tiny_processor, example):
    collator = ChatCollator(tiny_processor("llava15"))
    collator.fingerprint()
    collator._written = (*collator._written[:2], "remembered")
    collator([example, example])
    assert collator.made_of()["processor"]["tokenizer"] == "remembered"
    change(collator.processor.tokenizer)
    assert len(collator.made_of()["processor"]["tokenizer"]) == 64


@pytest.mark.slow
@pytest.mark.sweep
def test_fingerprint_is_the_same_in_every_process(tiny_dir):
    """Whatever PYTHONHASHSEED orders sets by; with tokens of equal length, which patterns hold in some order."""
    source = (
        "import sys; from transformers import AutoProcessor; from vlm_sft import ChatCollator\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1])\n"
        "template = processor.chat_template + '{% if notes %}{% endif %}'\n"
        "kwargs = {'chat_template': template, 'notes': set('abcdefghij')}\n"
        "collator = ChatCollator(processor, chat_template_kwargs=kwargs)\n"
        "print(collator.fingerprint(), collator.template.reserved.pattern, collator.template.added.pattern)"
    )
    command, options = [sys.executable, "-c", source, str(tiny_dir("qwen2_5_vl"))], {"stdout": subprocess.PIPE}
    started = [
        subprocess.Popen(command, env=os.environ | {"PYTHONHASHSEED": seed}, text=True, **options) for seed in "12"
    ]
    printed = {process.communicate(timeout=300)[0] for process in started}
    assert len(printed) == 1
    assert len(printed.pop().split()[0]) == 64
