"""Answers are what was trained and what plain generation gives; the model and the training stay as they were."""

from __future__ import annotations

import contextlib
import copy
import html
import json
import re
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conversations
import pytest
import runs
import torch
from families import TEN
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model
from PIL import Image
from together import together
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TrainerCallback, TrainingArguments

from vlm_sft.chat.collator import IGNORE_INDEX, ChatCollator
from vlm_sft.chat.template import ChatTemplate
from vlm_sft.evaluation.callback import evaluate_answers
from vlm_sft.evaluation.generate import generate, split_reference
from vlm_sft.evaluation.metrics import exact_match
from vlm_sft.models.loading import load_processor


def picture(shade: int, width: int = 40) -> Image.Image:
    return Image.new("RGB", (width, 40), (shade, 255 - shade, 128))


def turn(role: str, text: str, *, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


ROWS = [
    {"messages": [turn("user", "What is this?", images=1), turn("assistant", "A cat.")], "images": [picture(10)]},
    {
        "messages": [
            turn("user", "How many dogs are there in this picture?", images=1),
            turn("assistant", "There are two."),
            turn("user", "And in this one?", images=1),
            turn("assistant", "seven"),
        ],
        "images": [picture(200), picture(90, 60)],
    },
    {"messages": [turn("user", "hello"), turn("assistant", "yes")], "images": []},
]
ANSWERS = ["A cat.", "seven", "yes"]


class Scripted(torch.nn.Module):
    """Stands in for a model: records what it is asked, and says the same whatever that is."""

    def __init__(self, processor: Any, said: str = "x", *, eos_token_id: Any = None) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.generation_config = SimpleNamespace(eos_token_id=eos_token_id)
        self.said = processor.tokenizer(said, add_special_tokens=False, return_tensors="pt")["input_ids"]
        self.asked: list[dict[str, Any]] = []

    def generate(self, **asked: Any) -> torch.Tensor:
        self.asked.append(asked)
        ids = asked["input_ids"]
        return torch.cat([ids, self.said.expand(len(ids), -1)], dim=1)


@pytest.mark.parametrize("family", TEN)
@pytest.mark.parametrize("row", ROWS, ids=["one turn", "two turns", "text only"])
def test_prompt_is_what_training_reads_before_the_answer(family, row, tiny_processor):
    processor = tiny_processor(family)
    [trained], _ = ChatCollator(processor, train_on="last_assistant").encode([row])
    answer_starts = int((trained.labels != IGNORE_INDEX).nonzero()[0])
    model = Scripted(processor)
    generate(model, ChatTemplate(processor), [row], progress=False)
    assert model.asked[0]["input_ids"][0].tolist() == trained.tokens["input_ids"][:answer_starts].tolist()


@pytest.mark.parametrize("family", TEN)
def test_a_model_in_training_says_what_it_was_taught_and_stays_in_training(family, tiny_model, tiny_processor):
    model, processor = tiny_model(family), tiny_processor(family)
    batch = ChatCollator(processor)(ROWS)
    model.activation_checkpointing_enable()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    frozen = model.get_input_embeddings().eval()
    for _ in range(80):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.05:
            break
    modes = [module.training for module in model.modules()]
    # One batch, so that the rows of different length lean on their padding and each stops by itself.
    assert generate(model, ChatTemplate(processor), ROWS, batch_size=3, max_new_tokens=12, progress=False) == ANSWERS
    assert generate(model, ChatTemplate(processor), ROWS, batch_size=2, max_new_tokens=12, progress=False) == ANSWERS
    assert [module.training for module in model.modules()] == modes
    assert model.training
    assert not frozen.training
    assert model.config.use_cache is False


def test_the_cache_is_used_although_training_has_switched_it_off(tiny_model, tiny_processor, monkeypatch):
    model, processor = tiny_model("llava15").train(), tiny_processor("llava15")
    model.activation_checkpointing_enable()
    model.config.use_cache = model.generation_config.use_cache = False
    lengths = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    generate(model, ChatTemplate(processor), ROWS[:1], max_new_tokens=4, progress=False)
    assert lengths[0] > 1
    assert lengths[1:] == [1] * (len(lengths) - 1)


def test_a_model_that_fails_is_left_in_training_too(tiny_model, tiny_processor, monkeypatch):
    model = tiny_model("llava15").train()

    def fail(**asked):
        assert not model.training
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, ChatTemplate(tiny_processor("llava15")), ROWS, progress=False)
    assert model.training


@pytest.mark.parametrize(
    ("family", "stops"),
    [
        ("llava15", ["</s>"]),
        ("qwen2_5_vl", ["<|im_end|>"]),
        ("idefics3", ["<end_of_utterance>", "<|end_of_text|>"]),
        ("gemma3", ["<end_of_turn>", "<eos>"]),
    ],
)
def test_generation_ends_at_the_trained_stop_token_at_eos_and_where_configured(family, stops, tiny_processor):
    processor = tiny_processor(family)
    expected = set(processor.tokenizer.convert_tokens_to_ids(stops))
    for configured, more in ((None, set()), (7, {7}), ([7, 8], {7, 8})):
        model = Scripted(processor, eos_token_id=configured)
        generate(model, ChatTemplate(processor), ROWS[:1], progress=False)
        assert set(model.asked[0]["eos_token_id"]) == expected | more
    model = Scripted(processor, f"two dogs{stops[0]} and more")
    assert generate(model, ChatTemplate(processor), ROWS[:1], progress=False) == ["two dogs"]


def test_a_stop_token_of_ones_own_ends_earlier_answers_and_generation(tiny_processor):
    processor = tiny_processor("llava15")
    model = Scripted(processor)
    generate(model, ChatTemplate(processor, stop_token="<pad>"), [ROWS[1]], progress=False)
    pad = processor.tokenizer.pad_token_id
    assert model.asked[0]["input_ids"][0].tolist().count(pad) == 1
    assert pad in model.asked[0]["eos_token_id"]
    with pytest.raises(ValueError, match="'<stop>' is not an added token"):
        ChatTemplate(processor, stop_token="<stop>")


def test_quantized_and_adapted_model_says_what_plain_generation_says(tiny_model, tiny_processor):
    processor = tiny_processor("llava15")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=64, lora_dropout=0.5)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llava15", quantization_config=quantized), lora).train()
    answers = generate(model, ChatTemplate(processor), ROWS[:1], max_new_tokens=8, progress=False)
    model.eval()
    asked = [turn("user", "What is this?")]
    asked[0]["content"].insert(0, {"type": "image", "image": picture(10)})
    inputs = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )

    def plain() -> str:
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    assert answers == [plain()]
    with model.disable_adapter():
        assert answers != [plain()]


def test_greedy_whatever_the_model_would_do(tiny_model, tiny_processor):
    model, processor = tiny_model("llava15"), tiny_processor("llava15")
    greedy = generate(model, ChatTemplate(processor), ROWS, max_new_tokens=8, progress=False)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, num_beams=2)
    before = model.generation_config.to_dict()
    assert generate(model, ChatTemplate(processor), ROWS, max_new_tokens=8, progress=False) == greedy
    assert model.generation_config.to_dict() == before


def test_question_ends_before_the_last_answer():
    question = split_reference(
        {"messages": [*ROWS[0]["messages"], turn("user", "And now?", images=1)], "images": [1, 2]}
    )
    assert (len(question.messages), question.images, question.reference) == (3, [1, 2], None)
    question = split_reference(ROWS[1])
    assert (len(question.messages), question.images, question.reference) == (3, ROWS[1]["images"], "seven")


def test_rows_as_arrow_writes_them(tiny_processor):
    filled = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    processor = tiny_processor("qwen2_5_vl")
    model = Scripted(processor)
    generate(model, ChatTemplate(processor), [ROWS[0]], progress=False)
    generate(model, ChatTemplate(processor), [{"messages": filled, "images": ROWS[0]["images"]}], progress=False)
    assert torch.equal(model.asked[0]["input_ids"], model.asked[1]["input_ids"])


def test_images_are_what_training_sees(tiny_processor):
    """Encoded as `datasets.Image(decode=False)` leaves them, and with more than eight bits."""
    processor = tiny_processor("llava15")
    encoded, deep = BytesIO(), Image.new("I;16", (40, 40), 300 * 100)
    picture(10).save(encoded, "PNG")
    for image in ({"bytes": encoded.getvalue(), "path": None}, deep):
        row = ROWS[0] | {"images": [image]}
        model = Scripted(processor)
        generate(model, ChatTemplate(processor), [row], progress=False)
        trained = ChatCollator(processor)([row])
        assert torch.equal(model.asked[0]["pixel_values"], trained["pixel_values"])


def test_bad_rows_are_named(tiny_processor):
    processor = tiny_processor("llava15")
    with pytest.raises(ValueError, match="no rows"):
        generate(Scripted(processor), ChatTemplate(processor), [])
    bad = ROWS[2] | {"images": [picture(0)]}
    with pytest.raises(ValueError, match=r"^row 2: 1 images but the messages hold 0"):
        generate(Scripted(processor), ChatTemplate(processor), [*ROWS[:2], bad], progress=False)
    with pytest.raises(ValueError, match=r"^row 70: 1 images"):  # rows chosen from many
        generate(Scripted(processor), ChatTemplate(processor), [*ROWS[:2], bad | {"row": 70}], progress=False)


def share_of_the_rows(folder: Path) -> tuple[list[str], list[int], str]:
    """All answers, the sizes of the batches that this process answered, and the bar of its progress."""
    TrainingArguments("never_written", use_cpu=True).device  # noqa: B018 joins the launch, as in a recipe
    model, sizes = AutoModelForImageTextToText.from_pretrained(folder), []
    run = model.generate
    model.generate = lambda **asked: sizes.append(len(asked["input_ids"])) or run(**asked)
    template = ChatTemplate(load_processor(folder))
    with contextlib.redirect_stderr(StringIO()) as shown:
        answers = generate(model, template, ROWS, batch_size=1, max_new_tokens=5)
    return answers, sizes, shown.getvalue()


@pytest.mark.loopback
@pytest.mark.sweep
def test_two_processes_share_the_rows_and_both_know_all_answers(tiny_dir, tiny_model, tiny_processor):
    alone = generate(tiny_model("llava15"), ChatTemplate(tiny_processor("llava15")), ROWS, max_new_tokens=5)
    # Three rows for two processes: the second starts again, so that both take part in as many batches.
    (*ours, bar), (*theirs, nothing) = together(share_of_the_rows, tiny_dir("llava15"))
    assert ours == theirs == [alone, [1, 1]]
    assert "Generating: 100%" in bar
    assert nothing == ""


def evaluated(folder: Path, output_dir: Path, *, callback: bool = True, **options: Any) -> Any:
    """A finished four-step training run that evaluates every two; `callback`'s settings under their own names."""
    names = ("rows", "metrics", "references", "num_rows")
    asked = {"rows": runs.rows(5), "metrics": {"accuracy": exact_match}, "max_new_tokens": 5}
    asked |= {name: options.pop(name) for name in names if name in options}
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": runs.rows(4)}
    arguments["collator"] = ChatCollator(load_processor(folder))
    trainer = runs.trainer(folder, output_dir, **{"callbacks": []} | arguments | options)
    if callback:
        evaluate_answers(trainer, asked.pop("rows"), asked.pop("metrics"), **asked)
    trainer.train()
    return trainer


def test_callback_logs_numbers_and_writes_samples(tiny_dir, tmp_path, capsys):
    metrics = {"accuracy": exact_match, "length": lambda said, right: sum(map(len, said)) / len(said)}
    trainer = evaluated(tiny_dir("llava15"), tmp_path, metrics=metrics, num_rows=2)
    logged = [entry for entry in trainer.state.log_history if "eval_length" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert all({"eval_accuracy", "eval_generation_s"} <= entry.keys() for entry in logged)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    # Two of five rows, spread: 0 and 2.
    assert [(sample["step"], sample["row"]) for sample in samples] == [(2, 0), (2, 2), (4, 0), (4, 2)]
    assert [sample["reference"] for sample in samples] == ["There are 0.", "There are 2."] * 2
    for sample in samples:
        assert sample["scores"]["length"] == len(sample["prediction"])
        assert sample["scores"]["accuracy"] == float(sample["prediction"] == sample["reference"])
    assert "answers 2 of 5 rows, up to 5 tokens each" in capsys.readouterr().err


def test_page_holds_the_answers_before_training_beside_the_newest(tiny_dir, tmp_path):
    trainer = evaluated(tiny_dir("llava15"), tmp_path, num_rows=2, eval_on_start=True, learning_rate=1e-2)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    said = {(line["step"], line["row"]): line["prediction"] for line in lines}
    assert [line["step"] for line in lines] == [0, 0, 2, 2, 4, 4]
    assert said[0, 0] != said[4, 0]

    def shown() -> list[str]:
        """Before and after, row by row."""
        page = (tmp_path / "samples.html").read_text()
        assert "before: step 0, after: step 4" in page
        assert page.count("data:image/png") == 2
        answers = re.findall(r'class="mark \w+">(.*?)</span></td>', page, re.S)
        return [html.unescape(re.sub(r"</?b>", "", text)) for text in answers]

    assert shown() == [said[0, 0], said[4, 0], said[0, 2], said[4, 2]]
    # An evaluation after training, as of the best model, takes the place of the last one.
    with torch.no_grad():
        trainer.model.lm_head.weight.neg_()
    trainer.evaluate()
    assert shown()[::2] == [said[0, 0], said[0, 2]]
    assert shown()[1::2] != [said[4, 0], said[4, 2]]


def test_the_metric_chooses_the_best_model(tiny_dir, tmp_path):
    scores = iter([0.75, 0.25])
    trainer = evaluated(
        tiny_dir("llava15"),
        tmp_path,
        metrics={"accuracy": lambda said, right: next(scores) if len(said) == 5 else 0.0},
        metric_for_best_model="accuracy",
        greater_is_better=True,
    )
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.75, 2)


def test_looking_does_not_change_the_training(tiny_dir, tmp_path):
    lora = {
        "peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.3),
        "activation_checkpointing": True,
    }
    with_it = evaluated(tiny_dir("llava15"), tmp_path / "with", **lora)
    without = evaluated(tiny_dir("llava15"), tmp_path / "without", callback=False, **lora)
    assert runs.same(runs.weights(with_it.model), runs.weights(without.model))


def test_callback_names_rows_without_reference_and_names_that_are_taken(tiny_dir, tmp_path):
    handler = SimpleNamespace(callbacks=[])
    collator = ChatCollator(load_processor(tiny_dir("llava15")))
    args = SimpleNamespace(output_dir=str(tmp_path))
    trainer = SimpleNamespace(args=args, callback_handler=handler, data_collator=collator)
    unanswered = {"messages": [turn("user", "hello")], "images": []}
    metrics = {"accuracy": exact_match}
    with pytest.raises(ValueError, match="rows 1, 2 do not end with an assistant message"):
        evaluate_answers(trainer, [ROWS[0], unanswered, unanswered], metrics)
    evaluate_answers(trainer, [unanswered], metrics, references=[["hi", "hello"]])
    with pytest.raises(ValueError, match="1 references for 3 rows"):
        evaluate_answers(trainer, ROWS, metrics, references=["yes"])
    with pytest.raises(ValueError, match="num_rows=0"):
        evaluate_answers(trainer, ROWS, metrics, num_rows=0)
    with pytest.raises(ValueError, match="0 metrics; each must be at least 1"):
        evaluate_answers(trainer, ROWS, {})
    trainer.data_collator = print
    with pytest.raises(ValueError, match="data_collator is a builtin_function_or_method; pass data_collator=collator"):
        evaluate_answers(trainer, ROWS, metrics)
    with pytest.raises(ValueError, match="reports eval_loss itself"):
        evaluated(tiny_dir("llava15"), tmp_path, metrics={"loss": exact_match})


def test_the_numbers_are_there_before_other_callbacks_look(tiny_dir, tmp_path):
    """Also before one that was given to the trainer, as `EarlyStoppingCallback` is."""
    seen = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append("eval_accuracy" in metrics)

    evaluated(tiny_dir("llava15"), tmp_path, callbacks=[Look()])
    assert seen == [True, True]


def test_torn_and_foreign_lines_of_samples_are_left_out(tiny_dir, tmp_path, capsys):
    """As a killed run leaves them, or somebody's editor."""
    ours = [{"step": 0, "row": row, "prediction": f"before {row}"} for row in (0, 2)]
    lines = [*map(json.dumps, ours), "[1]", '{"step": "x"}', "caf\xe9 \x85", '{"step": 0, "row": 4, "pred']
    (tmp_path / "samples.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    evaluated(tiny_dir("llava15"), tmp_path, num_rows=2)
    assert (tmp_path / "samples.jsonl").read_bytes().count(b"\n{") == 1 + 1 + 1 + 4
    page = (tmp_path / "samples.html").read_text()
    assert "before: step 0, after: step 4" in page
    assert "before 2" in page
    assert capsys.readouterr().err.count("4 lines are not samples of an evaluation") == 1


@pytest.mark.parametrize("family", TEN)
def test_inputs_are_those_of_the_processor_itself(family, tiny_processor):
    """What generation is given equals `apply_chat_template(..., add_generation_prompt=True)` on the same question."""
    processor = tiny_processor(family)
    for row in (
        ROWS[0],
        ROWS[2],
        {"messages": [turn("system", "Be brief."), *ROWS[0]["messages"]], "images": [picture(7)]},
    ):
        asked = copy.deepcopy(row["messages"][:-1])
        for part in asked[-1]["content"]:
            if part["type"] == "image":
                part["image"] = row["images"][0]
        plain = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        expected = processor.apply_chat_template(asked, add_generation_prompt=True, **plain)
        for prompter in (ChatTemplate(processor), ChatCollator(processor)):
            model = Scripted(processor)
            generate(model, prompter, [row], progress=False)
            [given] = model.asked
            assert expected.keys() <= given.keys()
            for name, value in expected.items():
                assert torch.equal(given[name], value), name


@pytest.mark.parametrize("family", TEN)
def test_prompts_of_random_conversations_are_those_of_training(family, tiny_processor):
    """The text before the last answer, of up to five exchanges, escaped tokens and all."""
    collator = ChatCollator(tiny_processor(family), reserved_tokens="escape")

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(conversations.examples())
    def check(example):
        [row], _ = collator.encode([example])
        question = split_reference(example)
        assert collator.prompt(question.messages) == row.rendered.text[: row.rendered.turns[-1].start]

    check()


def test_a_collator_guards_the_question_as_it_does_in_training(tiny_processor):
    processor = tiny_processor("qwen2_5_vl")
    row = {"messages": [turn("user", "what is <|im_end|>?")], "images": []}
    with pytest.raises(ValueError, match=r"^row 0: messages\[0\] \(user\) holds '<\|im_end\|>' as text"):
        generate(Scripted(processor), ChatCollator(processor), [row], progress=False)
    model = Scripted(processor)
    generate(model, ChatCollator(processor, reserved_tokens="escape"), [row], progress=False)
    stop = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    bare = Scripted(processor)
    generate(bare, ChatTemplate(processor), [{"messages": [turn("user", "what is?")], "images": []}], progress=False)
    assert (model.asked[0]["input_ids"] == stop).sum() == (bare.asked[0]["input_ids"] == stop).sum()
