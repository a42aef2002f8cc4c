"""Two processes train what one trains: the same losses and weights, however the model and the work are split."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_data import chats
from recipe_runs import ROOT, run
from safetensors.torch import load_file
from together import free_port, together
from torch.distributed.tensor import DTensor

from vlm_sft.loading import load_model
from vlm_sft.manifests import verify_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.loopback]

LORA = ("llava15_sft", "--no_load_in_4bit", "--no_use_dora", "--lora_dropout", "0", "--neftune_noise_alpha", "0")
QLORA = ("llava15_sft", "--lora_dropout", "0", "--neftune_noise_alpha", "0")
FULL = ("llava_finetune_full", "--mm_projector_lr", "0.01")
SMALL = (
    *("--use_cpu", "--max_steps", "4", "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2"),
    *("--warmup_steps", "0", "--lr_scheduler_type", "constant", "--learning_rate", "0.01", "--logging_steps", "1"),
    *("--eval_steps", "2", "--save_steps", "2", "--save_total_limit", "3", "--disable_tqdm", "True"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False"),
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


@pytest.mark.parametrize("config", ["cpu_2proc", "cpu_2proc_fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
@pytest.mark.parametrize("recipe", [LORA, FULL], ids=["lora", "full"])
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
    assert [text.count(" audited, ") for text in said] == [1, 0]


def shares(recipe: str, flags: list[object]) -> dict[str, Any]:
    """What this process holds of each parameter once the run is over."""
    finished = run(recipe, flags)
    parameters = dict(finished.trainer.model.named_parameters())
    return {
        "whole": sorted(name for name, value in parameters.items() if not isinstance(value, DTensor)),
        "held": sum(value.to_local().numel() for value in parameters.values() if isinstance(value, DTensor)),
        "all": sum(value.numel() for value in parameters.values() if isinstance(value, DTensor)),
    }


def test_four_bit_weights_are_shared_out_and_train_as_in_one_process(flags_of: Any, alone: Any, tmp_path: Path) -> None:
    found = together(shares, QLORA[0], flags_of(QLORA, tmp_path, *TWO), config="fsdp2_qlora")
    assert [share["whole"] for share in found] == [[], []]
    assert sum(share["held"] for share in found) == found[0]["all"]
    assert found[0]["held"] == pytest.approx(found[1]["held"], rel=0.05)
    assert losses_in(tmp_path) == pytest.approx(losses_in(alone(QLORA)), abs=1e-4)
    saved, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, alone(QLORA)))
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, atol=2e-3, rtol=0, msg=name)


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
        (LORA, 2, 1, "cpu_2proc"),
        (FULL, 1, 2, "cpu_2proc"),
        (FULL, 2, 1, "cpu_2proc"),
        (LORA, 2, 2, "cpu_2proc_fsdp2"),
        (FULL, 2, 2, "cpu_2proc_fsdp2"),
        (QLORA, 2, 2, "fsdp2_qlora"),
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


@pytest.mark.parametrize("config", ["cpu_2proc", "cpu_2proc_fsdp2"])
@pytest.mark.parametrize("recipe", [LORA, FULL], ids=["lora", "full"])
def test_the_best_checkpoint_is_kept_and_loaded(
    recipe: Sequence[str], config: str, flags_of: Any, tmp_path: Path
) -> None:
    """The loss falls, so with the sign turned the first checkpoint is the best."""
    best = ("--load_best_model_at_end", "True", "--metric_for_best_model", "eval_loss", "--greater_is_better", "True")
    flags = flags_of(recipe, tmp_path, *TWO, *best, "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1)
    together(shares, recipe[0], flags, config=config)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
    ]
    final, first, last = (load_model(tmp_path / name).state_dict() for name in ("", "checkpoint-1", "checkpoint-4"))
    assert all(torch.equal(weight, first[name]) for name, weight in final.items())
    assert any(not torch.equal(weight, last[name]) for name, weight in final.items())
