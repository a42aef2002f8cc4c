"""The gate: what `prove` refuses, what it prints, and that nothing is exchanged between it and the training."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from proven import METRICS, TRAINS, Pieces, RecipeArguments, RecipeConfig, pieces
from recipe_data import chats
from runs import Collate
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS, _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames
from trl import SFTConfig
from trl.trainer import utils as trl_utils

import vlm_sft
from vlm_sft import checks, proof
from vlm_sft.models.adapters import check_trains
from vlm_sft.training import config
from vlm_sft.training.callbacks import StopOnNaN


@pytest.fixture
def make(tiny_dir: Callable[[str], Path], tmp_path: Path) -> Callable[..., Pieces]:
    return lambda **options: pieces(tiny_dir("llava15"), tmp_path, **options)


def test_a_proven_run_trains_and_leaves_all_it_promises(make, tmp_path, capsys):
    run = make()
    proof = run.prove()
    table = capsys.readouterr().err
    run.trainer.train()
    assert vlm_sft.finish(run.trainer, proof)["eval_loss"] > 0
    left = {path.name for path in (tmp_path / "output").iterdir()}
    assert {"adapter_model.safetensors", "audit.html", "samples.html", "loss.png", "run.json", "README.md"} <= left
    recorded = json.loads((tmp_path / "output" / "run.json").read_text("utf-8"))
    assert "lora r 4" in recorded["proof"]["trains"]
    assert recorded["settings"]["recipe"] == {"lora_r": 4}
    assert "its 16 image tokens match the features" in recorded["proof"]["forward"]
    assert "language   lora r 4" in table


def test_the_table_fits_a_screen_and_shows_the_mask_of_a_row(make, capsys, record_property):
    run = make(lora={"use_dora": True}, load={"load_in_4bit": True})
    capsys.readouterr()
    run.prove()
    table = capsys.readouterr().err
    assert len(table.splitlines()) <= 28
    assert max(map(len, table.splitlines())) <= 120
    for subject in (
        "vision",
        "DoRA",
        "nf4",
        "8 to train on, 2 held out",
        "trained ",
        "lengths",
        "warm-up",
        "evaluations",
    ):
        assert subject in table
    assert "the frozen tower stays out of autograd" in table
    assert "ASSISTANT:[ It is" in table
    record_property("shown", table)


# Left out, doubled or in the wrong order


def test_training_without_proof(make):
    with pytest.raises(
        ValueError, match=r"train\(\) before prove\(\): .* call vlm_sft\.prove\(trainer, TRAINS, args\)"
    ):
        make().trainer.train()


def test_evaluation_without_proof(make):
    with pytest.raises(ValueError, match=r"evaluate\(\) before prove\(\)"):
        make().trainer.evaluate()


@pytest.mark.parametrize("missing", range(6))
def test_proof_without_each_guard(missing, make, tiny_dir):
    model = vlm_sft.load_model(tiny_dir("llava15"))
    guards = vlm_sft.guards(model)
    name = type(guards.pop(missing)).__name__
    with pytest.raises(ValueError, match=rf"{name} missing .* pass callbacks=vlm_sft\.guards\(model\)"):
        make(given={"callbacks": guards}).prove()


def test_guards_of_another_model(make, tiny_dir):
    with pytest.raises(ValueError, match=r"guards\(model\) was given another model"):
        make(given={"callbacks": vlm_sft.guards(vlm_sft.load_model(tiny_dir("llava15")))}).prove()


def test_callbacks_of_ones_own_may_follow(make):
    run = make()
    run.trainer.add_callback(EarlyStoppingCallback(1))
    run.prove()
    run.trainer.train()


def test_proof_twice_and_after_training(make):
    run = make()
    run.prove()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"prove\(\) was called already"):
            run.prove()
        if run.trainer.state.global_step == 0:
            run.trainer.train()


def test_the_images_of_audited_rows_are_not_held_in_training(make):
    run = make()
    report = run.prove().report
    assert len(report.rows) > 2
    holding = [row for row in report.rows if row.conversation.images]
    assert len(holding) <= len(report.shortest_of_kinds) <= 2  # two kinds of rows: with an image, and of text alone
    run.trainer.train()
    assert not any(row.conversation.images for row in report.rows)
    assert "data:image/png" in (Path(run.trainer.args.output_dir) / "audit.html").read_text("utf-8")


def test_a_second_training(make):
    run = make(save_strategy="no", load_best_model_at_end=False)
    run.prove()
    run.trainer.train()
    with pytest.raises(ValueError, match=r"train\(\) was called a second time"):
        run.trainer.train()


def test_a_second_training_where_the_first_left_checkpoints(make):
    run = make()
    run.prove()
    run.trainer.train()
    with pytest.raises(ValueError, match=r"would overwrite it: train with resume_from_checkpoint"):
        run.trainer.train()
    with pytest.raises(ValueError, match=r"train\(\) was called a second time"):
        run.trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(run.trainer))


def test_a_training_that_failed_does_not_begin_again(make, monkeypatch):
    run = make()
    run.prove()
    compute = run.trainer.training_step
    monkeypatch.setattr(run.trainer, "training_step", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.trainer.train()
    monkeypatch.setattr(run.trainer, "training_step", compute)
    with pytest.raises(ValueError, match=r"train\(\) was called a second time"):
        run.trainer.train()


def test_finish_without_training_or_with_another_proof(make, tmp_path, tiny_dir):
    run = make()
    proof = run.prove()
    with pytest.raises(ValueError, match=r"finish\(\) before the training has ended"):
        vlm_sft.finish(run.trainer, proof)
    (tmp_path / "other").mkdir()
    other = pieces(tiny_dir("llava15"), tmp_path / "other")
    other.prove()
    with pytest.raises(ValueError, match="the proof is of another trainer"):
        vlm_sft.finish(other.trainer, proof)


def test_a_run_without_finish_loses_nothing(make, tmp_path):
    run = make()
    run.prove()
    run.trainer.train()
    assert {"adapter_model.safetensors", "run.json", "README.md"} <= {p.name for p in (tmp_path / "output").iterdir()}


# Exchanged after the proof


def other_collator(run: Pieces) -> None:
    run.trainer.data_collator = vlm_sft.ChatCollator(run.processor, max_length=512)


def other_setting_of_the_collator(run: Pieces) -> None:
    run.trainer.data_collator = run.collator.with_settings(train_on="all")


def collator_of_another_kind(run: Pieces) -> None:
    run.trainer.data_collator = Collate(run.processor)


def other_chat_template(run: Pieces) -> None:
    run.processor.chat_template += " "


def other_rows(run: Pieces) -> None:
    run.trainer.train_dataset = run.data["train"].select(range(4))


def other_held_out_rows(run: Pieces) -> None:
    run.trainer.eval_dataset = run.data["train"]


def other_model(run: Pieces) -> None:
    run.trainer.model = run.trainer.model_wrapped = run.trainer.model.get_base_model()


def unfrozen_head(run: Pieces) -> None:
    run.model.lm_head.weight.requires_grad_(True)


def frozen_adapter(run: Pieces) -> None:
    next(w for n, w in run.trainer.model.named_parameters() if "lora_A" in n).requires_grad_(False)


def other_rate(run: Pieces) -> None:
    run.trainer.args.learning_rate = 1e-4


def other_steps(run: Pieces) -> None:
    run.trainer.args.max_steps = 3


def other_rates_by_part(run: Pieces) -> None:
    run.trainer.optimizer_cls_and_kwargs = vlm_sft.lr_by_part(run.trainer.args, {"language": 0.1})


def own_optimizer(run: Pieces) -> None:
    weights = [weight for weight in run.trainer.model.parameters() if weight.requires_grad]
    run.trainer.optimizer = torch.optim.SGD(weights[1:], lr=0.1)


def optimizer_of_another_rate(run: Pieces) -> None:
    weights = [weight for weight in run.trainer.model.parameters() if weight.requires_grad]
    run.trainer.optimizer = torch.optim.SGD(weights, lr=1e-6)


def half_weights(run: Pieces) -> None:
    run.trainer.model.half()


def other_scale(run: Pieces) -> None:
    next(each for each in run.trainer.model.modules() if hasattr(each, "lora_A")).scaling["default"] = 99.0


def other_processor(run: Pieces) -> None:
    run.trainer.processing_class = copy.deepcopy(run.processor)


def other_loss(run: Pieces) -> None:
    run.trainer.compute_loss_func = own_loss


def own_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs.logits.float().square().mean()


@pytest.mark.parametrize(
    ("exchange", "told"),
    [
        (optimizer_of_another_rate, "made with a learning rate of 1e-06, and the run has --learning_rate 0.01"),
        (half_weights, r"dtypes of trainable weights: .* in torch.float16 and \d+ more now, .* in torch.float32"),
        (other_scale, r"prove\(\): scales of adapters\. "),
        (other_processor, r"prove\(\): trainer.processing_class\. "),
        (other_loss, r"prove\(\): the loss\. "),
        (other_collator, r"exchanged after prove\(\): trainer.data_collator\. Change it before prove"),
        (other_setting_of_the_collator, "trainer.data_collator; settings of the collator or its processor"),
        (collator_of_another_kind, "trainer.data_collator; settings of the collator or its processor"),
        (other_chat_template, r"prove\(\): settings of the collator or its processor\. "),
        (other_rows, r"prove\(\): trainer.train_dataset\. "),
        (other_held_out_rows, r"prove\(\): trainer.eval_dataset\. "),
        (other_model, r"prove\(\): trainer.model; "),
        (unfrozen_head, r"trainable weights: .*lm_head\.weight now"),
        (frozen_adapter, "lora_A.* no longer"),
        (other_rate, r"--learning_rate 0\.0001, was 0\.01"),
        (other_steps, "--max_steps 3, was 4"),
        (other_rates_by_part, r"prove\(\): trainer.optimizer_cls_and_kwargs\. "),
        (own_optimizer, r"lacks 1 that should .*lora_"),
    ],
)
def test_what_is_exchanged_after_the_proof(exchange, told, make):
    run = make()
    run.prove()
    exchange(run)
    with pytest.raises(ValueError, match=told):
        run.trainer.train()


def test_the_settings_of_a_collator_cannot_be_set(make):
    run = make()
    with pytest.raises(AttributeError):
        run.collator.settings = run.collator.with_settings(train_on="all").settings
    with pytest.raises(AttributeError):
        run.collator.settings.train_on = "all"


def test_an_evaluation_with_another_collator(make):
    run = make()
    run.prove()
    other_setting_of_the_collator(run)
    with pytest.raises(ValueError, match="data_collator was exchanged"):
        run.trainer.evaluate()


@pytest.mark.parametrize("count", [0, -1])
def test_an_audit_of_no_row(count, make):
    with pytest.raises(ValueError, match=rf"num_rows={count} \(--num_rows\): expected at least 1 row to audit"):
        make().prove(num_rows=count)


# Pieces that do not belong together


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"given": {"data_collator": None}}, "pass data_collator=collator"),
        ({"given": {"formatting_func": str}}, "Leave formatting_func out of SFTTrainer, and pass to_conversation="),
        ({"given": {"peft_config": None}}, r"pass peft_config=lora_config\(model, TRAINS\)"),
        ({"collator": {"max_length": 100}}, "pass max_length=training_args.max_length to ChatCollator"),
        ({"checked": False}, r"were not checked: data = vlm_sft.check_rows\(data, collator"),
        ({"answers": False}, r"call vlm_sft.evaluate_answers\(trainer, data\['test'\], METRICS\)"),
    ],
)
def test_pieces_left_out(options, told, make):
    with pytest.raises(ValueError, match=told):
        make(**options).prove()


def test_another_processor(make, tiny_dir):
    run = make(given={"processing_class": vlm_sft.load_processor(tiny_dir("llava15"))})
    with pytest.raises(ValueError, match="pass processing_class=processor"):
        run.prove()


def test_rows_checked_with_another_collator(make):
    run = make()
    other = vlm_sft.ChatCollator(run.processor, max_length=512, train_on="last_assistant")
    data = vlm_sft.check_rows(run.data, other)
    with pytest.raises(ValueError, match="checked with a collator of other settings"):
        make(data=data, checked=False).prove()


def test_rows_checked_for_another_length(make):
    run = make()
    data = vlm_sft.check_rows(run.data, run.collator.with_settings(max_length=600))
    with pytest.raises(ValueError, match="checked with a collator of other settings"):
        make(data=data, checked=False).prove()


def test_rows_drawn_by_another_seed(make, tmp_path):
    chats(tmp_path / "halves", train=10, test=2)
    data = vlm_sft.load_conversations(tmp_path / "halves" / "train", seed=3, max_eval_rows=2)
    with pytest.raises(ValueError, match=r"drawn with seed=3, and the run has --seed 42: pass seed=training_args.seed"):
        make(data=data).prove()


@pytest.mark.parametrize(
    ("trains", "told"),
    [
        ({}, "TRAINS"),
        ({"projektor": "full"}, "projektor.*projector"),
        ({"language": "Lora"}, "Lora"),
        ({"language": "lora", "vision": "full"}, "vision"),
        ({"head": "lora"}, "head"),
        ({"language": ["nothing"]}, "nothing"),
        ({"language": "lora", "projector": "full"}, "projector"),
        ({"language": ["q_proj"]}, "adapted and not asked for"),
    ],
)
def test_another_sentence_than_what_trains(trains, told, make):
    with pytest.raises(ValueError, match=told):
        make().prove(trains)


def test_full_on_a_quantized_part(make):
    with pytest.raises(ValueError, match="quantized"):
        make(load={"load_in_4bit": True}).prove({"language": "full"})


# Flags and settings


def test_a_flag_that_nothing_reads(make):
    @dataclass
    class More(RecipeArguments):
        forgotten: int = 1

    run = make()
    run.args = More()
    run.args.lora_r  # noqa: B018
    with pytest.raises(ValueError, match=r"nothing has read --forgotten.*args\.forgotten"):
        run.prove()


def test_arguments_that_are_none_of_ours(make):
    run = make()
    run.args = {"lora_r": 4}
    with pytest.raises(ValueError, match=r"args is a dict; expected the recipe's RecipeArguments"):
        run.prove()
    run.args = None
    run.prove()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_a_config_that_sfttrainer_made_itself(make, tmp_path):
    plain = SFTConfig(
        str(tmp_path), max_length=512, eval_strategy="no", remove_unused_columns=False, max_steps=2, bf16=False
    )
    with pytest.raises(ValueError, match="pass args=training_args to SFTTrainer"):
        make(given={"args": plain}).prove()


ACTING = {"max_length": 64, "loss_type": "dft", "activation_offloading": True, "router_aux_loss_coef": 0.1}
OTHERS = {bool: True, int: 8, float: 0.5, str: "another"}
OWN = [f for f in fields(SFTConfig) if f.name not in {g.name for g in fields(TrainingArguments)}]


@pytest.mark.parametrize("setting", [f for f in OWN if f.name not in ACTING], ids=lambda f: f.name)
def test_every_setting_of_sftconfig_without_effect_is_refused(setting, tmp_path):
    given = {"dataset_kwargs": {"skip_prepare_dataset": False}, "model_init_kwargs": {"dtype": "auto"}}
    kinds = {"truncation_mode": "keep_end", "packing_strategy": "wrapped", "pad_to_multiple_of": 8}
    value = (given | kinds).get(setting.name, not setting.default if isinstance(setting.default, bool) else "another")
    value = {"dataset_num_proc": 2, "eval_packing": True, "completion_only_loss": True}.get(setting.name, value)
    with pytest.raises((ValueError, FutureWarning), match=f"without effect here: --{setting.name} |deprecated"):
        RecipeConfig(str(tmp_path), **{setting.name: value})


@pytest.mark.parametrize("name", ACTING)
def test_settings_of_sftconfig_that_act_are_taken(name, tmp_path):
    RecipeConfig(str(tmp_path), **{name: ACTING[name]})


OPTIMS = [name.value for name in OptimizerNames]
READ = {"optim_args": "ctx.optim_args", "optim_target_modules": "_setup_low_rank_optimizer"}


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("name", READ)
def test_settings_of_an_optimizer_that_does_not_read_them_are_refused(name, optim, tmp_path, monkeypatch):
    """As the source of transformers' maker of each says: of bitsandbytes', it reads them for RMSprop and AdEMAMix."""
    monkeypatch.setattr(config, "set_hardware_defaults", lambda args: [])  # which trains without a GPU by another one
    source = inspect.getsource(_OPTIMIZER_HANDLERS[optim])
    reads = READ[name] in source and (
        optim not in _BITSANDBYTES_OPTIMIZERS or "rmsprop" in optim or "ademamix" in optim
    )
    given = {"optim": optim, name: "rank=8" if name == "optim_args" else "all-linear"}
    if reads:
        RecipeConfig(str(tmp_path), bf16=False, **given)
    else:
        told = rf"without effect here: --{name} {given[name]}\. --optim {optim} reads no such \(sgd and ademamix"
        with pytest.raises(ValueError, match=told):
            RecipeConfig(str(tmp_path), bf16=False, **given)


# Plans that cannot be meant


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"warmup_steps": 4}, "the warm-up takes 4 of the run's 4 steps.*--warmup_steps 0"),
        ({"metric_for_best_model": "eval_bleu"}, "eval_bleu is reported by nothing; reported are eval_loss, eval_anls"),
        ({"metric_for_best_model": "eval_cer"}, "--greater_is_better False"),
        ({"metric_for_best_model": "eval_anls", "greater_is_better": False}, "--greater_is_better True"),
        ({"greater_is_better": True}, "takes the worst eval_loss for the best: --greater_is_better False"),
        ({"metric_for_best_model": "mean_token_accuracy", "greater_is_better": False}, "--greater_is_better True"),
        ({"metric_for_best_model": "eval_entropy"}, "eval_entropy is no better for being more or less; choose among"),
        ({"max_steps": 0}, r"would train nothing: --max_steps 0 \(expected more than 0\)"),
        ({"max_steps": -1, "num_train_epochs": 0}, "would train nothing: --num_train_epochs 0 "),
        ({"learning_rate": 0.0}, "would train nothing: --learning_rate 0 "),
        ({"learning_rate": -1.0}, "would train nothing: --learning_rate -1 "),
        ({"gradient_accumulation_steps": -1}, "would train nothing: --gradient_accumulation_steps -1 "),
        ({"gradient_accumulation_steps": 0}, "would train nothing: --gradient_accumulation_steps 0 "),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 64}, "leaves out all 8 rows, less than one b"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 2},
            "constant has no warm-up, and --warmup_steps asks for 2",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 100}},
            "warmup_stable_decay with .* has its peak at 0.0",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1.0}},
            "has its peak at 85.* times --learning_rate 0.01",
        ),
    ],
)
def test_plans_that_cannot_be_meant(settings, told, make):
    with pytest.raises(ValueError, match=told):
        make(**settings).prove()


@pytest.mark.parametrize("warmup", [0, 1])
def test_schedules_that_reach_the_learning_rate(warmup, tmp_path):
    for kind in (
        "linear",
        "cosine",
        "constant_with_warmup",
        "polynomial",
        "inverse_sqrt",
        *["constant"] * (not warmup),
    ):
        args = RecipeConfig(str(tmp_path), lr_scheduler_type=kind)
        assert not checks._schedule_faults(args, kind, warmup, 4), kind
    floor = RecipeConfig(
        str(tmp_path), lr_scheduler_type="cosine_warmup_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-5}
    )
    assert not checks._schedule_faults(floor, "cosine_warmup_with_min_lr", warmup, 10)
    own = RecipeConfig(str(tmp_path), optim="schedule_free_adamw", lr_scheduler_type="constant")
    assert not checks._schedule_faults(own, "constant", 2, 4)


def test_rates_of_parts_are_said(make):
    rates = {"optimizer_cls_and_kwargs": vlm_sft.lr_by_part(RecipeConfig("unused"), {"language": 1e-3})}
    assert make(given=rates).prove().facts["steps"].endswith("peak learning rate 0.01, language 0.001")


def test_training_rows_are_not_held_out(make):
    data = make().data
    with pytest.raises(ValueError, match=r"eval_dataset is given the rows to train on.*pass data\['test'\]"):
        make(data=data, checked=False, given={"eval_dataset": data["train"]}).prove()
    run = make(answers=False)
    vlm_sft.evaluate_answers(run.trainer, run.data["train"], METRICS, max_new_tokens=4)
    with pytest.raises(ValueError, match="evaluate_answers is given the rows to train on"):
        run.prove()


def more_embeddings(config: Any, model: Any) -> None:
    model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 31)


def other_layer(config: Any, model: Any) -> None:
    config.vision_feature_layer = -1


@pytest.mark.parametrize(
    ("change", "told"), [(more_embeddings, r"text_config\.vocab_size: recorded \d+"), (other_layer, "vision_feature_l")]
)
def test_a_base_that_was_changed_in_memory(change, told, make):
    run = make()
    base = run.trainer.model.get_base_model()
    change(base.config, base)
    with pytest.raises(ValueError, match=rf"the base was changed in memory \(.*{told}.*save the changed one"):
        run.prove()


def test_precision_of_the_launcher(make, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"--bf16 False --fp16 False, but the run would be in mixed precision 'bf16'"):
        make(bf16=False).prove()


def test_a_loss_of_ones_own_is_said(make):
    run = make()
    other_loss(run)
    said = run.prove().facts["changed"]
    assert f"the loss is {__name__}.own_loss, not TRL's" in said
    assert "scores trained positions" not in said
    assert "the loss is" not in make().prove().facts["changed"]


def test_merged_adapters_train_nothing(make):
    run = make()
    run.trainer.model.merge_adapter()
    with pytest.raises(ValueError, match=r"the adapters are merged.*unmerge_adapter"):
        run.prove()
    run.trainer.model.unmerge_adapter()
    run.prove()
    run.trainer.model.merge_adapter()
    with pytest.raises(ValueError, match=r"exchanged after prove\(\): scales of adapters"):
        run.trainer.train()


def test_a_loss_has_the_same_name_in_every_process(make):
    class Loss:
        def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            return own_loss(outputs, labels)

    trainer = make().trainer
    for given, name in ((partial(own_loss, num_items_in_batch=1), "own_loss"), (Loss(), Loss.__qualname__)):
        trainer.compute_loss_func = given
        assert proof._own_loss(trainer) == f"{__name__}.{name}"


def test_one_held_out_row_to_choose_by(make, tmp_path):
    data = vlm_sft.load_conversations(chats(tmp_path / "few", test=1))
    with pytest.raises(ValueError, match="one held-out row would choose the best weights"):
        make(data=data).prove()


def test_no_image_in_any_row(make, tmp_path):
    rows = [{"prompt": f"How many are {n}?", "response": f"{n}."} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = vlm_sft.load_conversations(tmp_path / "rows.jsonl", max_eval_rows=2, seed=42)
    with pytest.raises(ValueError, match=r"no training row has an image.*--columns images="):
        make(data=data).prove()


def test_a_plan_changes_no_number(make, tmp_path, tiny_dir):
    torch.manual_seed(1)
    run = make()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run.prove()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_forward_is_that_of_training(make):
    """On the device, in the precision, and by the model that the Trainer has prepared; once."""
    run = make(
        bf16=True, load={"dtype": torch.bfloat16}, eval_strategy="no", load_best_model_at_end=False, eval_on_start=False
    )
    run.prove()
    model, seen = run.trainer.model, []
    core = model.get_base_model().get_decoder()
    core.register_forward_pre_hook(lambda *_: seen.append((model.training, torch.is_autocast_enabled("cpu"))))
    run.trainer.train()
    steps = run.trainer.state.global_step
    assert seen[: steps + 1] == [(False, True), *[(True, True)] * steps]
    assert model.device == run.trainer.args.device


@pytest.mark.parametrize(("dora", "dropout", "costs"), [(True, 0.1, True), (True, 0.0, False), (False, 0.1, False)])
def test_what_dropout_costs_with_dora_is_said(dora, dropout, costs, make):
    said = make(lora={"use_dora": dora, "lora_dropout": dropout}).prove().facts
    assert ("costs" in said) is costs
    assert not costs or "lora_dropout 0 (here 0.1)" in said["costs"]


@pytest.mark.parametrize(("given", "size"), [({}, 2), ({"generation_batch_size": 6}, 6)])
def test_out_of_memory_in_answering_advises_its_own_batch_size(given, size, make, monkeypatch):
    asked = []

    def full(*_, batch_size, **options):
        asked.append(batch_size)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("vlm_sft.evaluation.callback.generate", full)
    run = make(**given)
    run.prove()
    with pytest.raises(torch.OutOfMemoryError) as stopped:
        run.trainer.train()
    [note] = stopped.value.__notes__
    assert asked == [size]
    assert note.startswith(f"evaluation after step 0: out of memory in answering {size} rows")
    assert f"--generation_batch_size {size // 2}" in note


def test_an_attention_that_the_recipe_does_not_pass_on(make):
    make(attn_implementation="sdpa").prove()
    with pytest.raises(ValueError, match=r"--attn_implementation eager has no effect, the model runs sdpa: pass"):
        make(attn_implementation="eager").prove()
    make(attn_implementation="eager", load={"attn_implementation": "eager"}).prove()


def test_the_way_of_a_row_to_the_first_step(make, tmp_path, monkeypatch):
    """The pass encodes each row once; after it only the audited ones, that of the forward, and the first batches."""
    encoded = []
    encode = vlm_sft.ChatCollator.encode
    monkeypatch.setattr(
        vlm_sft.ChatCollator, "encode", lambda self, rows: encoded.append(len(rows)) or encode(self, rows)
    )
    data = vlm_sft.load_conversations(chats(tmp_path / "many", train=80, test=4))
    run = make(
        data=data,
        max_steps=1,
        eval_on_start=False,
        eval_strategy="no",
        load_best_model_at_end=False,
        save_strategy="no",
    )
    assert sum(encoded) == 84
    run.prove()
    assert sum(encoded) == 84 + 64
    done = []
    step = run.trainer.training_step
    monkeypatch.setattr(run.trainer, "training_step", lambda *a: done.append(sum(encoded)) or step(*a))
    run.trainer.train()
    assert done == [84 + 64 + 1 + 2 + 2]  # accelerate fetches one batch ahead


def test_packed_rows(make, tmp_path, capsys):
    data = vlm_sft.load_conversations(chats(tmp_path / "few", train=12))
    run = make(data=data, collator={"padding_free": True})
    data = vlm_sft.check_rows(data, run.collator)
    data["train"] = vlm_sft.pack(data["train"], max_length=200)
    run = make(
        data=data,
        checked=False,
        collator={"padding_free": True},
        given={"data_collator": run.collator, "processing_class": run.processor},
    )
    run.prove()
    assert "3 to train on, 2 held out" in capsys.readouterr().err
    run.trainer.train()
    assert "without padding the loss of a token changes by" in capsys.readouterr().err


def test_a_stream_without_padding(make, tmp_path, capsys):
    data = vlm_sft.load_conversations(chats(tmp_path / "few", train=12), streaming=True, max_eval_rows=2)
    run = make(data=data, collator={"padding_free": True}, max_steps=1, train_sampling_strategy="random")
    run.prove()
    run.trainer.train()
    assert "without padding the loss of a token changes by" in capsys.readouterr().err


def test_the_number_of_steps_to_pass_over_reaches_the_guard(tiny_dir):
    found = [
        c.max_skipped
        for c in vlm_sft.guards(vlm_sft.load_model(tiny_dir("llava15")), max_skipped=3)
        if isinstance(c, StopOnNaN)
    ]
    assert found == [3]


# As runs are launched


def test_another_batch_size_found_in_the_same_training(make, monkeypatch):
    run = make(auto_find_batch_size=True, per_device_train_batch_size=4)
    run.prove()
    step, tried = run.trainer.training_step, []

    def out_of_memory_at_4(model: Any, inputs: Any, *rest: Any) -> Any:
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(model, inputs, *rest)

    monkeypatch.setattr(run.trainer, "training_step", out_of_memory_at_4)
    run.trainer.train()
    assert tried[0] == 4
    assert set(tried[-4:]) == {2}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13 on TRL's head
@pytest.mark.sweep
def test_torch_compile(make):
    run = make(torch_compile=True, torch_compile_backend="eager")
    run.prove()
    run.trainer.train()
    assert run.trainer.state.global_step == 4


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_scores_trained_positions_alone(compiled, make, monkeypatch, capsys):
    """On a CPU, unless it is compiled. What TRL scores is counted at its own function."""
    function, scored, rows = trl_utils._ChunkedLogProbFunction, [], []
    given = function.apply
    monkeypatch.setattr(trl_utils, "_use_triton", trl_utils._use_triton)  # put back afterwards
    monkeypatch.setattr(function, "apply", lambda hidden, *rest: scored.append(len(hidden)) or given(hidden, *rest))
    options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    run = make(eval_on_start=False, max_steps=1, **options)
    run.prove()
    assert ("the loss scores trained positions alone" in " ".join(capsys.readouterr().err.split())) is not compiled
    if compiled:
        assert not trl_utils._use_triton(torch.device("cpu"))
        return
    step = run.trainer.training_step
    monkeypatch.setattr(
        run.trainer, "training_step", lambda *all_: rows.append(all_[1]["labels"].clone()) or step(*all_)
    )
    run.trainer.train()
    assert scored[0] == int((rows[0][:, 1:] >= 0).sum())
    assert scored[0] < rows[0].numel() / 2


def test_rows_that_are_not_checked_before_come_in_random_order(make, capsys):
    run = make(on_bad_rows="ignore")
    run.prove()
    assert "rows come in random order" in capsys.readouterr().err
    run.trainer.train()
    assert run.trainer.state.global_step == 4


def test_the_sentence_is_judged_on_what_the_trainer_holds(make):
    run = make()
    report = check_trains(run.trainer.model, TRAINS)
    assert report.parts["language"].share == 1
    assert report.parts["vision"].trainable == 0
