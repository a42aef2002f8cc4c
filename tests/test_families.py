"""Every family whole: labels, adapters, 4-bit, a frozen tower, training, a fresh process, answers, merge.

`make test-families` runs all; the default suite a few.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conversations import assert_as_in_full, picture
from datasets import Dataset
from families import FAMILIES, TEN
from peft import get_peft_model
from proven import pieces
from transformers import AutoConfig

import vlm_sft
from vlm_sft.chat.audit import audit
from vlm_sft.chat.collator import IGNORE_INDEX, ChatCollator
from vlm_sft.evaluation.generate import generate
from vlm_sft.models.adapters import check_trains, lora_config
from vlm_sft.models.loading import load_model, load_processor
from vlm_sft.models.parts import part_of, parts_of, stacked_weights
from vlm_sft.models.quantization import check_quantized
from vlm_sft.tools import tiny
from vlm_sft.tools.merging import merge
from vlm_sft.upstream import sees_both_ways

REFUSED = {
    "llama4": "has no inner model, from whose hidden states TRL",
    "emu3": "adds text that it does not report",
    "paligemma": "cannot encode a question as a chat has it: .* choose a chat model",
    "t5gemma2": "an encoder-decoder",
}
IN_DEFAULT_SUITE = ("qwen3_5", "qwen3_vl_moe")
REWRITING = ("llava15", "llava_next", "llava_onevision", "vipllava", "llava_next_video", "glm46v", "glm4v_moe")
"""Templates that write an earlier answer, or what stands before it, differently from how the model was asked for it."""
PROVEN = [*TEN, *(name for name in FAMILIES if name not in REFUSED)]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def row(*turns: Any, images: int = 0) -> dict[str, Any]:
    """A conversation, user and assistant in turn; a question that is a list begins with its images."""
    messages = []
    for number, turn in enumerate(turns):
        words, shown = (turn[0], turn[1]) if isinstance(turn, tuple) else (turn, 0)
        content = [{"type": "image"}] * shown + [text(words)]
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return {"messages": messages, "images": [picture(40 + 24 * n, 40, n) for n in range(images)]}


LORA = {"language": "lora"}
ATTENTION = {"glm4v_moe": {"language": ["q_proj", "k_proj", "v_proj", "o_proj"]}}
"""What trains where PEFT cannot reach all layers, as the refusal says."""
ROWS = {
    "one turn": row(("What is it?", 1), "A seven.", images=1),
    "three turns": row(("What is it?", 1), "A seven.", "Sure?", "Yes.", "Why?", "It has a bar.", images=1),
    "two images": row(("Compare them.", 2), "The first is wide.", images=2),
    "text only": row("How many are two?", "Two."),
    "unicode": row(("Qu'est-ce? 日本語", 1), "Un élan naïve 🙂 привет", images=1),
    "image in turn two": row("Hello", "Hi.", ("And this?", 1), "A dog.", images=1),
}


@dataclass
class Twin:
    """A family's twin on the disk."""

    name: str
    folder: Path

    def __post_init__(self) -> None:
        (tiny if self.name in TEN else families).save(self.name, self.folder)

    @property
    def experts(self) -> bool:
        return bool(stacked_weights(load_model(self.folder)))


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Twin]:
    return cache(lambda name: Twin(name, tmp_path_factory.mktemp(name)))


def marked(names: Any) -> list[Any]:
    return [
        pytest.param(name, marks=[] if name in IN_DEFAULT_SUITE else [pytest.mark.families], id=name) for name in names
    ]


@pytest.fixture(params=marked(PROVEN))
def twin(request: pytest.FixtureRequest, twins: Callable[[str], Twin]) -> Twin:
    return twins(request.param)


def rows_of(twin: Twin) -> dict[str, Any]:
    def early(example: dict[str, Any]) -> bool:
        return bool(example["messages"][0]["content"][0]["type"] == "image")

    return {kind: example for kind, example in ROWS.items() if twin.name != "mllama" or early(example)}


def losses(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """The loss of each trained token, by row."""
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
    every = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return [loss[label != IGNORE_INDEX] for loss, label in zip(every, labels, strict=True)]


def answers_of(example: dict[str, Any]) -> list[str]:
    return [m["content"][0]["text"] for m in example["messages"] if m["role"] == "assistant"]


def pieces_of(example: dict[str, Any], collator: ChatCollator) -> list[dict[str, Any]]:
    """The row, or one for each answer where the template renders earlier answers differently."""
    return collator.split(example)


def test_labels_are_the_answers_and_prompts_those_of_inference(twin: Twin) -> None:
    processor = load_processor(twin.folder)
    collator = ChatCollator(processor)
    config = AutoConfig.from_pretrained(twin.folder)
    image_id = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    stops = load_model(twin.folder).generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    split = {kind: pieces_of(example, collator) for kind, example in rows_of(twin).items()}
    for kind, parts in split.items():
        learned = []
        for part in parts:
            batch = collator([part])
            ids, labels = batch["input_ids"][0], batch["labels"][0]
            assert not (labels == image_id).any(), kind
            assert ((ids == image_id).sum() > 0) == bool(part["images"]), kind
            trained = labels[labels != IGNORE_INDEX].tolist()
            assert trained[-1] in stops, kind
            learned.append(processor.tokenizer.decode([token for token in trained if token not in stops]))
        squeezed = ["".join(each.split()) for each in learned]
        squeezed = [re.sub("</?think>", "", each) for each in squeezed]  # no reasoning: the model writes an empty one
        words = ["".join(answer.split()) for answer in answers_of(ROWS[kind])]
        assert squeezed == (words if len(parts) > 1 else ["".join(words)]), kind
    rows = [part for parts in split.values() for part in parts]
    assert_as_in_full(collator, rows)
    report = audit(collator, rows)
    assert set(report.prompts) == {"equal those of inference"} or twin.name in REWRITING
    assert set(audit(collator, [ROWS["one turn"], ROWS["two images"]]).prompts) == {"equal those of inference"}


def test_a_row_in_a_batch_is_the_row_alone(twin: Twin) -> None:
    model, collator = load_model(twin.folder, dtype="float32").eval(), ChatCollator(load_processor(twin.folder))
    rows = [part for example in rows_of(twin).values() for part in pieces_of(example, collator)]
    together = losses(model, collator(rows))
    for example, found in zip(rows, together, strict=True):
        [alone] = losses(model, collator([example]))
        torch.testing.assert_close(found, alone, atol=2e-4, rtol=1e-4)


def test_attention_in_both_directions_is_told_from_the_code(twin: Twin) -> None:
    """Where the first token of an image sees the last, FlashAttention must be refused."""
    model, collator = load_model(twin.folder, dtype="float32").eval(), ChatCollator(load_processor(twin.folder))
    batch = collator([ROWS["one turn"]])
    [row], _ = collator.encode([ROWS["one turn"]])
    first, last = row.image.nonzero().flatten()[[0, -1]].tolist()
    [language] = parts_of(model).language
    layers = [m for n, m in model.named_modules() if re.fullmatch(rf"{re.escape(language)}\.(\w+\.)*\d+", n)]
    seen: list[torch.Tensor] = []

    def disturb(module: Any, args: Any, kwargs: Any) -> Any:
        states = (args[0] if args else kwargs["hidden_states"]).clone()
        states[..., last, :] += amount
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[..., first, :].clone())

    layers[0].register_forward_pre_hook(disturb, with_kwargs=True)
    layers[-1].register_forward_hook(keep)
    with torch.no_grad():
        for amount in (0.0, 10.0):  # noqa: B007
            model(**batch, use_cache=False)
    looks_ahead = first != last and not torch.equal(*seen)  # one token that attends to its image elsewhere
    assert sees_both_ways(model) >= looks_ahead
    if looks_ahead:
        with pytest.raises(ValueError, match="see each other in both directions, and FlashAttention would hide half"):
            load_model(twin.folder, attn_implementation="flash_attention_2")


def test_adapters_4bit_freezing_and_the_tower_out_of_autograd(twin: Twin) -> None:
    lora = ATTENTION.get(twin.name, LORA)
    if lora != LORA:
        with pytest.raises(ValueError, match=r"adapt its attention alone, as in TRAINS = .*'k_proj', 'o_proj'"):
            lora_config(load_model(twin.folder), LORA, lora_dropout=0)
    model = load_model(twin.folder, dtype="float32")
    parts = parts_of(model)
    collator = ChatCollator(load_processor(twin.folder))
    batch = collator([ROWS["one turn"]])
    assert lora_config(model, {"projector": "full"}) is None
    report = check_trains(model, {"projector": "full"})
    assert report.parts["projector"].share == 1
    lora_dropout = 0.0 if twin.experts else 0.05
    wrapped = get_peft_model(model, lora_config(model, lora, r=4, lora_dropout=lora_dropout))
    report = check_trains(wrapped, lora)
    assert report.parts["language"].adapted_layers
    flows: list[bool] = []
    for path in parts.vision:
        model.get_submodule(path).register_forward_hook(lambda m, a, output: flows.append(grads(output)))
    wrapped.enable_input_require_grads()
    wrapped.train()(**batch).loss.backward()
    assert flows
    assert not any(flows)
    assert all(w.grad is not None for w in wrapped.parameters() if w.requires_grad)
    packed = load_model(twin.folder, load_in_4bit=True, experts_in_16bit=twin.experts, dtype="bfloat16")
    assert check_quantized(packed)[0]
    wrapped = get_peft_model(packed, lora_config(packed, lora, r=4, lora_dropout=0))
    check_trains(wrapped, lora)
    with torch.autocast("cpu", torch.bfloat16):
        wrapped.train()(**batch).loss.backward()
    assert all(w.grad is not None for w in wrapped.parameters() if w.requires_grad)


def grads(output: Any) -> bool:
    found = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in found)


RELOAD = """
import json, sys, torch
from vlm_sft.models.loading import load_model
torch.set_num_threads(1)
for line in sys.stdin:
    adapter, batch, out = json.loads(line)
    with torch.no_grad():
        torch.save(load_model(adapter, dtype="float32").eval()(**torch.load(batch), use_cache=False).logits, out)
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def fresh_process() -> Iterator[Callable[[Path, Path], torch.Tensor]]:
    """The logits of a saved adapter on a saved batch, in another process."""
    process = subprocess.Popen([sys.executable, "-c", RELOAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def reload(adapter: Path, batch: Path) -> torch.Tensor:
        out = adapter / "logits.pt"
        process.stdin.write(json.dumps([str(adapter), str(batch), str(out)]) + "\n")
        process.stdin.flush()
        while (line := process.stdout.readline()) and line != "done\n":
            pass
        return torch.load(out)

    yield reload
    process.stdin.close()
    process.wait(60)


def test_two_steps_a_fresh_process_answers_and_merge(
    twin: Twin, tmp_path: Path, fresh_process: Callable[[Path, Path], torch.Tensor]
) -> None:
    chosen = list(rows_of(twin).values())
    rows = Dataset.from_list([{**example, "row": n} for n, example in enumerate(chosen)])
    data = {"train": rows, "test": rows.select([0])}
    trains = ATTENTION.get(twin.name, LORA)
    settings: dict[str, Any] = {"router_aux_loss_coef": 0.0} if twin.name == "glm4v_moe" else {}
    run = pieces(
        twin.folder,
        tmp_path,
        data=data,
        trains=trains,
        load={"dtype": "float32"},
        lora={"lora_dropout": 0.0},
        max_steps=2,
        bf16=False,
        per_device_train_batch_size=3,
        eval_strategy="no",
        load_best_model_at_end=False,
        save_strategy="no",
        **settings,
    )
    before = {name: value.clone() for name, value in state_of(run.model).items()}
    proof = run.prove(trains)
    assert str(parts_of(run.model)) in proof.facts["parts"]
    run.trainer.train()
    vlm_sft.finish(run.trainer, proof)
    after = state_of(run.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert {part_of(name.partition(".lora_")[0], parts_of(run.model)) for name in moved} == {"language"}
    batch = run.collator([ROWS["two images"]])
    torch.save(batch, tmp_path / "batch.pt")
    trained = run.trainer.model.eval()
    with torch.no_grad():
        logits = trained(**batch, use_cache=False).logits
        with trained.disable_adapter():
            bare = trained(**batch, use_cache=False).logits
    assert not torch.equal(logits, bare)
    adapter = tmp_path / "output"
    assert torch.equal(fresh_process(adapter, tmp_path / "batch.pt"), logits)
    [answer] = generate(trained, run.collator.template, [ROWS["one turn"]], max_new_tokens=3)
    assert isinstance(answer.text if hasattr(answer, "text") else answer, str)
    merged = merge(adapter, tmp_path / "merged", dtype="float32")
    assert merged.effect > 0


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, wherever PEFT has put them."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name.replace(".base_layer", "").removeprefix("base_model.model."): value for name, value in found.items()}


@pytest.mark.parametrize("name", marked(REFUSED))
def test_what_cannot_be_proven_is_refused_by_name(name: str, twins: Callable[[str], Twin]) -> None:
    folder = twins(name).folder

    def start() -> None:
        if name in ("t5gemma2", "llama4"):
            load_model(folder)
        else:
            ChatCollator(load_processor(folder)).encode(list(ROWS.values()))

    with pytest.raises(ValueError, match=REFUSED[name]):
        start()


@pytest.mark.families
def test_tiles_that_do_not_go_together_are_refused(twins: Callable[[str], Twin]) -> None:
    processor = load_processor(twins("perception_lm").folder)
    processor.image_processor.max_num_tiles = 4
    with pytest.raises(ValueError, match=r"PerceptionLMProcessor cannot encode images of different shapes together"):
        ChatCollator(processor)


@pytest.mark.families
def test_a_row_without_image_where_a_batch_cannot_hold_it(twins: Callable[[str], Twin]) -> None:
    collator = ChatCollator(load_processor(twins("mllama").folder))
    for kind in ("text only", "image in turn two"):
        with pytest.raises(
            ValueError, match=r"row 7: messages\[1\] is answered before there is an image, which Mllama"
        ):
            collator([{**ROWS[kind], "row": 7}])


def test_the_experts_of_a_mixture_are_counted_adapted_and_left_in_16_bit_only_when_that_is_accepted(
    twins: Callable[[str], Twin],
) -> None:
    folder = twins("qwen3_vl_moe").folder
    share = r"\d+ stacked experts in 16 bit \(75\.0% of the language model's matrices, 0\.00 GiB\)"
    with pytest.raises(ValueError, match=rf"bitsandbytes leaves {share}; accept that by experts_in_16bit=True"):
        load_model(folder, load_in_4bit=True)
    packed = load_model(folder, load_in_4bit=True, experts_in_16bit=True)
    assert re.search(share, str(check_quantized(packed)))
    packed.config.quantization_config.llm_int8_skip_modules = ["lm_head"]
    with pytest.raises(ValueError, match=r"\d+ stacked experts stay in 16 bit, which experts_in_16bit=True accepts"):
        check_quantized(packed)
    model = load_model(folder)
    for settings in ({"lora_dropout": 0.1}, {"lora_dropout": 0, "use_dora": True}):
        with pytest.raises(ValueError, match=r"PEFT \S+ has neither for the experts of a mixture .*set lora_dropout=0"):
            lora_config(model, LORA, **settings)
    by_name = {"language": ["q_proj", "gate_up_proj"]}
    wrapped = get_peft_model(model, lora_config(model, by_name, lora_dropout=0))
    report = check_trains(wrapped, by_name).parts["language"]
    assert 0.5 < report.share < 0.9
    assert "on q_proj, gate_up_proj" in report.how
    with pytest.raises(ValueError, match=r"layers asked for are not adapted: .*experts\.down_proj"):
        check_trains(wrapped, LORA)


@pytest.mark.families
def test_an_adapter_that_peft_would_lose_is_there_after_a_resume(twins: Callable[[str], Twin], tmp_path: Path) -> None:
    """PEFT renames the keys of this family's adapters and loads none of them."""
    folder = twins("deepseek_ocr2").folder
    settings = {"lora": {"lora_dropout": 0.0}, "load": {"dtype": "float32"}, "save_steps": 2, "eval_steps": 2}

    def train(out: Path, steps: int) -> Any:
        run = pieces(folder, out, max_steps=4, save_strategy="steps", **settings)
        run.prove()
        run.trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(run.trainer) if steps else None)
        return {name: weight for name, weight in run.model.named_parameters() if weight.requires_grad}

    whole = train(tmp_path / "whole", 0)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "output" / "checkpoint-4")
    resumed = train(tmp_path / "cut", 2)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
