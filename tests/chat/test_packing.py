"""Rows without padding train as padded ones do, on every family that can, and the others are refused."""

from __future__ import annotations

import pytest
import torch
from conversations import answer, ask, picture
from datasets import Dataset
from families import TEN
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import SFTConfig, SFTTrainer

from vlm_sft import IGNORE_INDEX, ChatCollator
from vlm_sft.chat.packing import _number_positions, check_padding_free, enable_padding_free, pack

REFUSED = {"gemma3"}
ROWS = [
    {"messages": [ask(None, "What is this?"), answer("A cat and a dog.")], "images": [picture(60, 40, 1)], "row": 0},
    {"messages": [ask("Hello there"), answer("Hi"), ask("more?"), answer("no")], "images": [], "row": 1},
    {
        "messages": [ask("Compare ", None, " and ", None, "."), answer("One is a red car; the other is not.")],
        "images": [picture(40, 40, 2), picture(30, 64, 3)],
        "row": 2,
    },
]


def batches(processor):
    return [ChatCollator(processor, padding_free=free, name_rows=False)(ROWS) for free in (False, True)]


@pytest.mark.parametrize("family", [family for family in TEN if family not in REFUSED])
def test_losses_and_gradients_are_those_of_padded_rows(family, tiny_model, tiny_processor):
    model = tiny_model(family)
    enable_padding_free(model)
    padded, flat = batches(tiny_processor(family))
    assert flat["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    assert "attention_mask" not in flat
    model.train()
    assert check_padding_free(model, ChatCollator(tiny_processor(family)), ROWS) < 1e-5
    assert model.training
    gradients = []
    for batch in (padded, flat):
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_models_that_mix_conversations_are_refused(family, tiny_model, tiny_processor):
    with pytest.raises(ValueError, match="does not keep the conversations of a row apart"):
        check_padding_free(tiny_model(family), ChatCollator(tiny_processor(family)), ROWS)


def test_a_row_of_each_kind_is_looked_at(tiny_model, tiny_processor):
    """Gemma 3 keeps texts apart, and mixes those with images."""
    model, collator = tiny_model("gemma3"), ChatCollator(tiny_processor("gemma3"))
    texts = [{"messages": [ask(f"Hello {n}"), answer("Hi")], "images": [], "row": n} for n in range(4)]
    assert check_padding_free(model, collator, texts) < 1e-4
    late = {"messages": [ask("Look: ", None), answer("A cat.")], "images": [picture(40, 40)], "row": 9}
    for other in (ROWS[0], ROWS[2], late):
        for rows in ([*texts, other], [{"packed": [*texts, other]}]):
            with pytest.raises(ValueError, match="does not keep the conversations of a row apart"):
                check_padding_free(model, collator, rows)


def test_qwen_needs_its_own_positions(tiny_model, tiny_processor):
    with pytest.raises(ValueError, match="does not keep the conversations of a row apart"):
        check_padding_free(tiny_model("qwen2_5_vl"), ChatCollator(tiny_processor("qwen2_5_vl")), ROWS)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_each_conversation_are_numbered_from_0(family, tiny_model, tiny_processor):
    """As alone, in all three directions: to shift all of one changes no attention, but long packs leave the range that
    the model was trained on."""
    core, collator = tiny_model(family).model, ChatCollator(tiny_processor(family), padding_free=True)
    found = _number_positions(core, (), collator(ROWS))[1]["position_ids"]
    alone = [_number_positions(core, (), collator([row]))[1]["position_ids"] for row in ROWS]
    assert found.shape[0] == 4
    assert torch.equal(found, torch.cat(alone, dim=-1))
    assert all((each[:, 0, 0] == 0).all() for each in alone)


def test_first_token_of_a_row_is_not_predicted_from_the_row_before(tiny_processor):
    flat = ChatCollator(tiny_processor("qwen2_5_vl"), padding_free=True, train_on="all")(ROWS)
    starts = flat["position_ids"][0] == 0
    assert starts.sum() == 3
    assert (flat["labels"][0][starts] == IGNORE_INDEX).all()
    with pytest.raises(ValueError, match=r"pad_to_multiple_of=8 with padding_free=True"):
        ChatCollator(tiny_processor("llava15"), padding_free=True, pad_to_multiple_of=8)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
@settings(deadline=None, derandomize=True)
def test_every_row_is_in_one_pack_within_the_budget(lengths):
    packs = pack(Dataset.from_dict({"row": list(range(len(lengths))), "length": lengths}), max_length=50)
    stored = packs.with_format(None)[:]
    assert sorted(n for packed in stored["packed"] for n in packed) == list(range(len(lengths)))
    assert [sum(lengths[n] for n in packed) for packed in stored["packed"]] == stored["length"]
    assert max(stored["length"]) <= 50
    assert [[row["row"] for row in packs[i]["packed"]] for i in range(len(packs))] == stored["packed"]
    # Best fit never leaves two packs that would fit into one.
    assert len(packs) == 1 or sum(sorted(stored["length"])[:2]) > 50


def test_rows_that_do_not_fit_are_named():
    rows = Dataset.from_dict({"row": [0, 1, 2], "length": [5, 10, 5]})
    with pytest.raises(ValueError, match=r"1 rows are longer than max_length=9 \(the first at \[1\]\)"):
        pack(rows, max_length=9)


@pytest.mark.parametrize("family", ["llava15", "qwen2_5_vl"])
def test_packs_train_through_trl_to_the_padded_loss(family, tiny_model, tiny_processor, tmp_path):
    processor = tiny_processor(family)
    dataset = Dataset.from_list(ROWS * 2).with_format(None)
    lengths = [len(row) for row in ChatCollator(processor).encode(ROWS * 2)[0]]
    packs = pack(dataset.add_column("length", lengths), max_length=sum(lengths[:3]))
    assert 1 < len(packs) < 6
    losses = {}
    for name, rows, size in (("padded", dataset, 6), ("packed", packs, len(packs))):
        model = tiny_model(family)
        enable_padding_free(model)
        args = SFTConfig(
            output_dir=str(tmp_path / name),
            max_steps=1,
            per_device_train_batch_size=size,
            max_length=None,
            remove_unused_columns=False,
            activation_checkpointing=False,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            dataloader_pin_memory=False,
        )
        collator = ChatCollator(processor, padding_free=name == "packed", name_rows=False)
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            processing_class=processor,
            data_collator=collator,
        )
        if name == "packed":
            check_padding_free(model, collator, [packs[0]])
        trainer.train()
        losses[name] = trainer.state.log_history[0]
    assert losses["packed"]["loss"] == pytest.approx(losses["padded"]["loss"], abs=1e-5)
    assert losses["packed"]["num_tokens"] == losses["padded"]["num_tokens"] == sum(lengths)


def test_packs_are_checked_by_their_rows(tiny_model, tiny_processor):
    packs = pack(Dataset.from_list(ROWS).add_column("length", [1, 1, 1]), max_length=3)
    collator = ChatCollator(tiny_processor("qwen2_5_vl"), padding_free=True)
    with pytest.raises(ValueError, match="does not keep the conversations of a row apart"):
        check_padding_free(tiny_model("qwen2_5_vl"), collator, packs)  # it was not made to accept them


def test_rows_without_padding_pay_with_flash_attention_alone(tiny_model):
    model = tiny_model("llava15")
    assert not enable_padding_free(model)
    # No kernel is at hand: the setting alone, as from_pretrained leaves it.
    for name, pays in {"eager": False, "flash_attention_2": True, "kernels-community/flash-attn3": True}.items():
        model.config.get_text_config()._attn_implementation = name
        assert enable_padding_free(model) is pays


def test_packs_take_the_column_of_lengths():
    rows = Dataset.from_dict({"row": [0, 1, 2], "length": [5, 4, 3]})
    assert pack(rows, max_length=8).with_format(None)["packed"][:] == [[0, 2], [1]]
    with pytest.raises(ValueError, match="check_rows adds it"):
        pack(rows.remove_columns("length"), max_length=8)
