"""Two processes train what one trains: the same losses and weights, however the model and the work are split."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from recipe_data import chats
from recipe_runs import ROOT, run
from safetensors.torch import load_file
from together import free_port, together
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trl import SFTConfig

from vlm_sft import ChatCollator, RecipeDefaults, checks, load_processor, proof, upstream
from vlm_sft.models import hardware, loading, quantization
from vlm_sft.models.adapters import lora_config
from vlm_sft.models.freezing import cast_trainable_to_fp32
from vlm_sft.models.hardware import set_hardware_defaults
from vlm_sft.models.loading import load_model
from vlm_sft.models.manifest import verify_checkpoint
from vlm_sft.models.parts import part_of, parts_of
from vlm_sft.tools import tiny
from vlm_sft.training.callbacks import StopOnNaN
from vlm_sft.training.checkpoints import SafeCheckpoints

pytestmark = [pytest.mark.slow, pytest.mark.loopback]
sweep = pytest.mark.sweep  # what another one shows of a like split already, or on another family

LORA = ("llava15_sft", "--no_load_in_4bit", "--no_use_dora", "--lora_dropout", "0", "--neftune_noise_alpha", "0")
QLORA = ("llava15_sft", "--lora_dropout", "0", "--neftune_noise_alpha", "0")
FULL = ("llava_finetune_full", "--mm_projector_lr", "0.01")
SMALL = (
    *("--use_cpu", "--max_steps", "4", "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2"),
    *("--warmup_steps", "0", "--lr_scheduler_type", "constant", "--learning_rate", "0.01", "--logging_steps", "1"),
    *("--eval_on_start", "False", "--eval_steps", "2", "--save_steps", "2", "--save_total_limit", "3"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False", "--disable_tqdm", "True"),
)
ONE, TWO = ("--gradient_accumulation_steps", "2"), ("--gradient_accumulation_steps", "1")  # four rows a step


@pytest.fixture(scope="module")
def flags_of(tiny_dir: Callable[[str], Path], tmp_path_factory: Any) -> Callable[..., list[object]]:
    data = chats(tmp_path_factory.mktemp("data") / "chats", train=40, test=4)

    def flags(recipe: Sequence[str], output: Path, *more: object) -> list[object]:
        model = ["--model_name_or_path", tiny_dir("llava15"), "--dataset_name", data]
        return [*model, *recipe[1:], *SMALL, "--output_dir", output, *more]

    return flags


def losses_in(output: Path, *, step: int = 4) -> list[float]:
    state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text("utf-8"))
    return [entry[key] for entry in state["log_history"] for key in ("loss", "eval_loss") if key in entry]


@pytest.fixture(scope="module")
def alone(flags_of: Any, tmp_path_factory: Any) -> Callable[[Sequence[str]], Path]:
    """alone(recipe): the folder of its run of four steps in one process."""
    folders: dict[Sequence[str], Path] = {}

    def folder_of(recipe: Sequence[str]) -> Path:
        if recipe not in folders:
            folders[recipe] = tmp_path_factory.mktemp("alone") / "output"
            run(recipe[0], flags_of(recipe, folders[recipe], *ONE))
        return folders[recipe]

    return folder_of


def launch(config: str, recipe: str, flags: Sequence[object], *, more: Sequence[str] = ()) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml"]
    port = [] if "--main_process_port" in more else ["--main_process_port", "0"]
    command = [*words, *port, *more, f"recipes/{recipe}.py", *map(str, flags)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"}, **streams)


def ended(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return said


@pytest.mark.parametrize(
    "config",
    [
        pytest.param("cpu_2proc", marks=sweep),
        "cpu_2proc_fsdp2",
        *(pytest.param(config, marks=sweep) for config in ("deepspeed_zero2", "deepspeed_zero3")),
    ],
)
@pytest.mark.parametrize("recipe", [LORA, pytest.param(FULL, marks=sweep)], ids=["lora", "full"])
def test_two_launched_processes_train_what_one_trains(
    recipe: Sequence[str], config: str, flags_of: Any, alone: Any, tmp_path: Path
) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    ended(launch(config, recipe[0], flags_of(recipe, tmp_path, *TWO)))
    assert losses_in(tmp_path) == pytest.approx(losses_in(alone(recipe)), abs=1e-4)
    assert verify_checkpoint(tmp_path / "checkpoint-4") == []
    expected, found = (load_model(folder).state_dict() for folder in (alone(recipe), tmp_path))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=2e-3, rtol=0, msg=name)


@sweep
def test_two_machines_train_one_model_and_save_once(flags_of: Any, alone: Any, tmp_path: Path) -> None:
    """Two launchers as on two machines, that meet at an address of this one."""
    meet = ("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()))
    flags = flags_of(LORA, tmp_path / "output", *TWO)
    machines = [launch("multi_node", LORA[0], flags, more=(*meet, "--machine_rank", str(n))) for n in (0, 1)]
    said = [ended(machine) for machine in machines]
    assert losses_in(tmp_path / "output") == pytest.approx(losses_in(alone(LORA)), abs=1e-4)
    assert json.loads((tmp_path / "output/run.json").read_text("utf-8"))["hardware"]["processes"] == 2
    assert verify_checkpoint(tmp_path / "output/checkpoint-4") == []
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert [text.count(" audited\n") for text in said] == [1, 0]


def shares(recipe: str, flags: list[object], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What this process holds of each parameter once the run is over, on a machine that computes in this dtype, and
    whether the model was sharded when the proof ran its forward."""
    for module in (hardware, loading, quantization):
        module.best_dtype = lambda: dtype  # type: ignore[attr-defined]
    forwards, check = [], proof.check_forward
    proof.check_forward = lambda *given: (forwards.append(isinstance(given[2], FSDPModule)), check(*given))[1]  # type: ignore[func-returns-value]
    finished = run(recipe, flags)
    parameters = dict(finished.trainer.model.named_parameters())
    return {
        "forwards": forwards,
        "dtypes": {str(value.dtype) for value in parameters.values()},
        "whole": sorted(name for name, value in parameters.items() if not isinstance(value, DTensor)),
        "held": sum(value.to_local().numel() for value in parameters.values() if isinstance(value, DTensor)),
        "all": sum(value.numel() for value in parameters.values() if isinstance(value, DTensor)),
    }


def turned(recipe: str, flags: list[object]) -> dict[str, Any]:
    """`shares`, where more loss is better."""
    checks._REPORTED["loss"] = False
    return shares(recipe, flags)


@sweep
def test_four_bit_weights_are_shared_out_and_train_as_in_one_process(flags_of: Any, alone: Any, tmp_path: Path) -> None:
    found = together(shares, QLORA[0], flags_of(QLORA, tmp_path, *TWO), config="fsdp2_qlora")
    assert [share["whole"] for share in found] == [[], []]
    assert [share["forwards"] for share in found] == [[True], [True]]
    assert sum(share["held"] for share in found) == found[0]["all"]
    assert found[0]["held"] == pytest.approx(found[1]["held"], rel=0.05)
    assert losses_in(tmp_path) == pytest.approx(losses_in(alone(QLORA)), abs=1e-4)
    saved, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, alone(QLORA)))
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, atol=2e-3, rtol=0, msg=name)


@sweep
def test_in_bfloat16_as_on_a_gpu_packed_weights_train_as_in_one_process(flags_of: Any, tmp_path: Path) -> None:
    """Weights, packed weights and the forward in bfloat16, what trains in float32: FSDP casts, DDP has autocast. FSDP2
    casts the loss as well (accelerate's `output_dtype`), so it comes rounded to a bfloat16's 8 bits."""
    bf16, where = ("--bf16", "True"), {1: tmp_path / "1", 2: tmp_path / "2"}
    for processes, config, split in ((1, "cpu_2proc", ONE), (2, "fsdp2_qlora", TWO)):
        flags = flags_of(QLORA, where[processes], *split, *bf16)
        found = together(shares, QLORA[0], flags, torch.bfloat16, processes=processes, config=config)
        assert {"torch.bfloat16", "torch.float32"} <= found[0]["dtypes"] <= {*found[0]["dtypes"], "torch.uint8"}
    assert ("torch.uint8" in found[0]["dtypes"]) is False
    assert losses_in(where[2]) == pytest.approx(losses_in(where[1]), rel=2**-7)
    flags = flags_of(QLORA, tmp_path / "3", *TWO)
    with pytest.raises(
        RuntimeError, match=r"stored as torch\.bfloat16, and would be cast to torch\.float16 bit by bit"
    ):
        together(fp16_over_bf16, flags, config="fsdp2_qlora")


def fp16_over_bf16(flags: list[object]) -> None:
    """A CPU's autocast knows no float16: it is said, as a GPU's would say it."""
    check = checks.check_storage
    said = SimpleNamespace(mixed_precision="fp16")
    checks.check_storage = lambda trainer: check(SimpleNamespace(model=trainer.model, accelerator=said))
    shares(QLORA[0], [*flags, "--bf16", "True"], torch.bfloat16)


def grown(base: Path, output: Path) -> list[int]:
    """By how many bytes memory of this process's own, no file's, grows: as a model is read, and as what trains is
    widened."""

    def own() -> int:
        [line] = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "Anonymous:" in line]
        return int(line.split()[1]) * 1024

    RecipeDefaults(str(output), eval_strategy="no")  # starts the group of processes
    start = own()
    model = load_model(base, dtype=torch.bfloat16)
    model.requires_grad_(True)
    read = own()
    upstream.widen_once(model)
    cast_trainable_to_fp32(model)
    return [read - start, own() - read]


def test_under_fsdp_one_process_widens_what_trains_for_all(tmp_path: Path) -> None:
    """That they train the same from there, the other tests of cpu_2proc_fsdp2 show."""
    model, processor = tiny.build("llava15", hidden_size=768, num_layers=4)
    for made in (model.to(torch.bfloat16), processor):
        made.save_pretrained(tmp_path / "base")
    size = sum(weight.numel() for weight in model.parameters())
    first, second = together(grown, tmp_path / "base", tmp_path, config="cpu_2proc_fsdp2")
    assert max(first[0], second[0]) < 0.3 * 2 * size  # mapped from the file
    assert first[1] > 0.9 * 4 * size
    assert second[1] < 0.1 * 4 * size


# Interrupted, and taken up again by another number of processes.


def on(processes: int, recipe: Sequence[str], flags: list[object], config: str) -> None:
    if processes == 1:
        run(recipe[0], flags)
    else:
        together(shares, recipe[0], flags, processes=processes, config=config)


@pytest.mark.parametrize(
    ("recipe", "before", "after", "config"),
    [
        (LORA, 1, 1, "cpu_2proc"),
        (LORA, 1, 2, "cpu_2proc"),
        pytest.param(LORA, 2, 1, "cpu_2proc", marks=sweep),
        pytest.param(FULL, 1, 2, "cpu_2proc", marks=sweep),
        pytest.param(FULL, 2, 1, "cpu_2proc", marks=sweep),
        pytest.param(LORA, 2, 2, "cpu_2proc_fsdp2", marks=sweep),
        pytest.param(FULL, 2, 2, "cpu_2proc_fsdp2", marks=sweep),
        pytest.param(QLORA, 2, 2, "fsdp2_qlora", marks=sweep),
    ],
    ids=["lora-1-1", "lora-1-2", "lora-2-1", "full-1-2", "full-2-1", "lora-fsdp2", "full-fsdp2", "qlora-fsdp2"],
)
def test_a_run_goes_on_with_the_rows_it_had_not_seen(
    recipe: Sequence[str], before: int, after: int, config: str, flags_of: Any, alone: Any, tmp_path: Path
) -> None:
    for processes, steps in ((before, 2), (after, 4)):
        split = ONE if processes == 1 else TWO
        on(processes, recipe, flags_of(recipe, tmp_path, *split, "--max_steps", steps), config)
    expected, found = losses_in(alone(recipe)), losses_in(tmp_path)
    assert found == pytest.approx(expected, abs=1e-6 if before == after == 1 else 1e-4)


def test_a_sharded_checkpoint_is_no_whole_one(flags_of: Any, alone: Any, tmp_path: Path) -> None:
    output = shutil.copytree(alone(LORA), tmp_path / "output")
    with pytest.raises(RuntimeError, match="sharding: recorded None, now 'FSDP'"):
        together(shares, LORA[0], flags_of(LORA, output, *TWO, "--max_steps", 6), config="cpu_2proc_fsdp2")


@sweep
@pytest.mark.parametrize("config", ["cpu_2proc", "cpu_2proc_fsdp2"])
@pytest.mark.parametrize("recipe", [LORA, FULL], ids=["lora", "full"])
def test_the_best_checkpoint_is_kept_and_loaded(
    recipe: Sequence[str], config: str, flags_of: Any, tmp_path: Path
) -> None:
    """The loss falls, so with the sign turned the first checkpoint is the best."""
    best = ("--load_best_model_at_end", "True", "--metric_for_best_model", "eval_loss", "--greater_is_better", "True")
    flags = flags_of(recipe, tmp_path, *TWO, *best, "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1)
    together(turned, recipe[0], flags, config=config)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
    ]
    final, first, last = (load_model(tmp_path / name).state_dict() for name in ("", "checkpoint-1", "checkpoint-4"))
    assert all(torch.equal(weight, first[name]) for name, weight in final.items())
    assert any(not torch.equal(weight, last[name]) for name, weight in final.items())


# Uneven work: no picture at one process, other numbers of them, a last batch that is short.


def mixed(count: int) -> Dataset:
    """Rows by twos: pictures, none, two and one, three and none, one and none; batches of two go to the processes in
    turn."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    pictures = iter([Image.fromarray(pixels) for pixels in noise])
    rows = []
    for n, number in enumerate((1, 1, 0, 0, 2, 1, 0, 3, 1, 0)[:count]):
        question = [{"type": "image", "text": None}] * number + [{"type": "text", "text": f"How many are in {n}?"}]
        answer = [{"type": "text", "text": f"There are {number}."}]
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"row": n, "images": [next(pictures) for _ in range(number)], "messages": talk})
    return Dataset.from_list(rows)


class Settings(SFTConfig):
    def __post_init__(self) -> None:
        set_hardware_defaults(self)
        super().__post_init__()


def uneven(base: Path, output: Path, train: Sequence[str], count: int, options: dict[str, Any]) -> list[float]:
    """The losses of one epoch."""
    runs.SFTConfig = Settings
    model = load_model(base)
    lora_config(model, dict.fromkeys(train, "full"))
    order = {"train_sampling_strategy": "sequential", "num_train_epochs": 1, "max_steps": -1, "save_strategy": "no"}
    given = {"model": model, "dataset": mixed(count), "collator": ChatCollator(load_processor(base))}
    trainer = runs.trainer(base, output, callbacks=[StopOnNaN()], **given, **order, **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


TRAINED = {
    "tower frozen": ("projector", "language", "head"),
    "tower trained": ("vision", "projector", "language", "head"),
}


@pytest.mark.parametrize("train", ["tower frozen", pytest.param("tower trained", marks=sweep)])
@pytest.mark.parametrize(
    ("config", "find_unused"),
    [pytest.param("cpu_2proc", True, marks=sweep), ("cpu_2proc", False), ("cpu_2proc_fsdp2", None)],
    ids=["ddp-finds-unused", "ddp", "fsdp2"],
)
def test_a_process_without_pictures_keeps_up(
    train: str, config: str, find_unused: bool | None, tiny_dir: Any, tmp_path: Path
) -> None:
    options = {} if find_unused is None else {"ddp_find_unused_parameters": find_unused}
    arguments = (tiny_dir("llava15"), tmp_path, TRAINED[train], 8)
    if train == "tower trained" and find_unused is False:
        # LLaVA reads the tower before its last layer, which DDP then waits for: loud, and not of the pictures' making.
        with pytest.raises(RuntimeError, match="Parameter indices which did not receive grad"):
            together(uneven, *arguments, options, config=config, limit_s=60)
        return
    found = together(uneven, *arguments, options, config=config, limit_s=60)
    assert found[0] == pytest.approx(uneven(*arguments, {"gradient_accumulation_steps": 2}), abs=1e-4)


@pytest.mark.parametrize("config", ["cpu_2proc", pytest.param("cpu_2proc_fsdp2", marks=sweep)])
def test_a_short_last_batch_ends_the_epoch(config: str, tiny_dir: Any, tmp_path: Path) -> None:
    found = together(uneven, tiny_dir("llava15"), tmp_path, TRAINED["tower frozen"], 7, {}, config=config, limit_s=60)
    assert len(found[0]) == 2


@sweep
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "gemma3", "internvl"])
def test_sharded_families_keep_up(family: str, tiny_dir: Any, tmp_path: Path) -> None:
    arguments = (tiny_dir(family), tmp_path, TRAINED["tower frozen"], 8)
    found = together(uneven, *arguments, {}, config="cpu_2proc_fsdp2", limit_s=60)
    assert found[0] == pytest.approx(uneven(*arguments, {"gradient_accumulation_steps": 2}), abs=1e-4)


@sweep
@pytest.mark.parametrize("config", ["deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_keeps_up(config: str, flags_of: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    DatasetDict(train=mixed(8).remove_columns("row"), test=mixed(2).remove_columns("row")).save_to_disk(
        tmp_path / "rows"
    )
    more = ("--dataset_name", tmp_path / "rows", "--train_sampling_strategy", "sequential", "--max_steps", 2)
    run(FULL[0], flags_of(FULL, tmp_path / "alone", *ONE, *more))
    ended(launch(config, FULL[0], flags_of(FULL, tmp_path / "output", *TWO, *more)))
    assert losses_in(tmp_path / "output", step=2) == pytest.approx(losses_in(tmp_path / "alone", step=2), abs=1e-4)


class Spoil(ChatCollator):
    """The pictures of row 4 come out as NaN."""

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = super().__call__(examples)
        if 4 in batch["rows"].tolist():
            batch["pixel_values"][0, 0, 0, 0] = torch.nan
        return batch


def spoiled(base: Path, output: Path, max_skipped: int) -> tuple[int, bool]:
    """Steps passed over, and whether the weights of this process are finite."""
    runs.SFTConfig = Settings
    model, guard = load_model(base), StopOnNaN(max_skipped=max_skipped)
    lora_config(model, dict.fromkeys(TRAINED["tower frozen"], "full"))
    options = {"train_sampling_strategy": "sequential", "max_steps": 2, "save_steps": 1, "dataset": mixed(8)}
    collator = Spoil(load_processor(base))
    callbacks = [SafeCheckpoints(), guard]
    trainer = runs.trainer(base, output, model=model, callbacks=callbacks, collator=collator, **options)
    trainer.train()
    shares = [value.to_local() if isinstance(value, DTensor) else value for value in trainer.model.parameters()]
    return guard.skipped, all(bool(torch.isfinite(share).all()) for share in shares)


@pytest.mark.parametrize("config", ["cpu_2proc", pytest.param("cpu_2proc_fsdp2", marks=sweep)])
def test_a_nan_at_one_process_stops_both_and_can_be_passed_over(config: str, tiny_dir: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"FloatingPointError: step 2: .* from row 4\b") as stopped:
        together(spoiled, tiny_dir("llava15"), tmp_path / "stopped", 0, config=config, limit_s=60)
    assert str(stopped.value).count("FloatingPointError: step 2") == 2
    assert verify_checkpoint(tmp_path / "stopped/checkpoint-1") == []
    found = together(spoiled, tiny_dir("llava15"), tmp_path / "passed", 1, config=config, limit_s=60)
    assert found == [(1, True), (1, True)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_blank_picture_weighs_nothing_and_reaches_the_tower(
    family: str, tiny_model: Any, tiny_processor: Any
) -> None:
    processor, model = tiny_processor(family), tiny_model(family)
    losses = []
    for picture in (False, True):
        batch = ChatCollator(processor, image_in_every_batch=picture)(list(mixed(4))[2:])
        assert batch.pop("rows").tolist() == [2, 3, -1][: 3 if picture else 2]
        assert picture == ("pixel_values" in batch)
        loss = model(**batch, use_cache=False).loss
        losses.append(float(loss))
    loss.backward()
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    gradients = [p.grad for name, p in model.named_parameters() if part_of(name, parts_of(model)) == "projector"]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
