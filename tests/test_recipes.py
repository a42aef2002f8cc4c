"""Every recipe, through its own `main`, on a tiny twin: what it trains, leaves and refuses, and how it goes on."""

from __future__ import annotations

import ast
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image
from recipe_data import DATASETS, llava_parts
from recipe_runs import ROOT, Run, recipe, run
from transformers import AutoModelForImageTextToText

from vlm_sft.models.llava import assemble_llava
from vlm_sft.models.loading import load_model, load_processor
from vlm_sft.models.manifest import verify_checkpoint
from vlm_sft.models.parts import part_of, parts_of

ADAPTERS = {  # recipe -> family of its twin, data
    "llava15_sft": ("llava15", "chats"),
    "llava_next_sft": ("llava_next", "chats"),
    "qwen2_5_vl_sft": ("qwen2_5_vl", "charts"),
    "qwen3_5_sft": ("qwen3_5", "formulas"),
    "smolvlm_sft": ("smolvlm", "questions"),
    "gemma4_sft": ("gemma4", "chats"),
    "internvl_sft": ("internvl", "chats"),
    "table_to_markdown_sft": ("qwen2_5_vl", None),
}
WHOLE = {  # recipe -> the parts that it trains
    "llava_pretrain": {"projector"},
    "llava_finetune_full": {"projector", "language", "head"},
}
RECIPES = (*ADAPTERS, *WHOLE)
NOT_IN_4_BIT = {"qwen3_5_sft", "smolvlm_sft", "table_to_markdown_sft", *WHOLE}
SMALL = (
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--warmup_steps", "0"),
    *("--logging_steps", "1", "--eval_steps", "2", "--save_steps", "2", "--learning_rate", "0.01"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False", "--disable_tqdm", "True"),
)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = DATASETS[kind](tmp_path_factory.mktemp("data") / kind)
        return folders[kind]

    return folder_of


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tower and a text model."""
    return llava_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def flags_of(
    tiny_dir: Callable[[str], Path], data: Callable[[str], Path], parts: tuple[Path, Path]
) -> Callable[[str], list[object]]:
    """What makes a recipe small and local, all but `--max_steps` and `--output_dir`."""

    def flags(name: str) -> list[object]:
        if name == "llava_pretrain":
            source = ["--dataset_name", data("captions"), "--image_folder", data("captions").parent / "images"]
            model = ["--model_name_or_path", parts[1], "--vision_tower", parts[0], *source]
        elif name == "llava_finetune_full":
            model = ["--model_name_or_path", tiny_dir("llava15"), "--dataset_name", data("chats")]
        else:
            family, kind = ADAPTERS[name]
            source = ["--dataset_name", data(kind)] if kind else ["--num_tables", 100, "--max_new_tokens", 4]
            model = ["--model_name_or_path", tiny_dir(family), *source]
        return [*model, *SMALL]

    return flags


@pytest.fixture(scope="session")
def trained(flags_of: Callable[[str], list[object]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """trained(recipe): its run of two steps, one for the whole session; copy the folder before writing to it."""
    runs: dict[str, Run] = {}

    def run_of(name: str) -> Run:
        if name not in runs:
            output = tmp_path_factory.mktemp("outputs") / name
            runs[name] = run(name, [*flags_of(name), "--max_steps", 2, "--output_dir", output])
        return runs[name]

    return run_of


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_leaves_what_it_promises(name: str, trained: Callable[[str], Run]) -> None:
    finished = trained(name)
    assert finished.steps == finished.trainer.state.global_step == 2
    assert math.isfinite(finished.metrics["eval_loss"])
    weights = "adapter_model.safetensors" if name in ADAPTERS else "model.safetensors"
    saved = {weights, "processor_config.json", "tokenizer.json", "chat_template.jinja"}
    files = saved | {"loss.png", "samples.html", "samples.jsonl", "run.json", "README.md"}
    assert files <= {path.name for path in finished.output.iterdir()}
    assert verify_checkpoint(finished.output / "checkpoint-2") == []
    told = json.loads((finished.output / "run.json").read_text("utf-8"))
    assert told["results"].items() >= json.loads(json.dumps(finished.metrics)).items()
    assert told["results"]["train_runtime"] > 0
    assert "64 audited" in told["proof"]["audited"] or told["data"]["train"]["rows"] < 64
    assert told["proof"]["quantized"].startswith("nf4") == (name not in NOT_IN_4_BIT)
    assert told["data"]["train"]["rows"] > told["data"]["test"]["rows"] > 0


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_asked_parts_move(
    name: str, trained: Callable[[str], Run], tiny_dir: Callable[[str], Path], parts: tuple[Path, Path]
) -> None:
    model = trained(name).trainer.model
    if name == "llava_pretrain":
        start, _ = assemble_llava(*parts, seed=trained(name).trainer.args.seed)
    else:
        family = ADAPTERS[name][0] if name in ADAPTERS else "llava15"
        start = AutoModelForImageTextToText.from_pretrained(tiny_dir(family))
    before, moved = dict(start.named_parameters()), set()
    adapters = {key: weight for key, weight in model.named_parameters() if ".lora_" in key}
    for key, weight in model.named_parameters():
        bare = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if key not in adapters and weight.is_floating_point() and not torch.equal(weight, before[bare]):
            moved.add(bare)
    if name in WHOLE:
        assert not adapters
        assert moved == {key for key in before if part_of(key, parts_of(start)) in WHOLE[name]}
    else:
        assert not moved
        assert {part_of(key, parts_of(start)) for key in adapters} == {"language"}
        assert all(weight.any() for key, weight in adapters.items() if ".lora_B." in key)
        assert any("magnitude" in key for key in adapters) == (name == "llava15_sft")


@pytest.mark.parametrize("name", RECIPES)
def test_the_folder_holds_the_trained_model(name: str, trained: Callable[[str], Run]) -> None:
    finished = trained(name)
    trainer, processor = finished.trainer, load_processor(finished.output)
    assert processor.chat_template == trainer.processing_class.chat_template
    batch = trainer.data_collator([trainer.eval_dataset[0]])
    del batch["rows"]
    reloaded = load_model(finished.output)
    with torch.no_grad():
        expected, found = (model.eval()(**batch).logits for model in (trainer.model, reloaded))
    assert torch.equal(found, expected)


def test_tables_are_measured_by_generation(trained: Callable[[str], Run]) -> None:
    finished = trained("table_to_markdown_sft")
    assert finished.trainer.args.metric_for_best_model == "eval_anls"
    assert "eval_anls" in finished.metrics
    samples = [json.loads(line) for line in (finished.output / "samples.jsonl").read_text("utf-8").splitlines()]
    assert all(sample["reference"].startswith("| ") for sample in samples)


def test_drawn_tables_differ_in_look_and_repeat_with_the_seed(tmp_path: Path) -> None:
    module = recipe("table_to_markdown_sft")
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        module.write_tables(tmp_path / name, count=12, seed=seed)
    first, again, other = (list(Dataset.load_from_disk(str(tmp_path / name))) for name in ("first", "again", "other"))
    assert first == again != other
    assert len({row["image"].size for row in first}) > 6
    assert len({row["image"].getpixel((1, 1)) for row in first}) == len(module.LOOKS)
    for row in first:
        lines = row["markdown"].splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert set(lines[1]) == set("| -")


def test_the_pictures_of_qwen_gemma_smolvlm_and_internvl_are_bounded(trained: Callable[[str], Run]) -> None:
    """The limit is the processor's own, so the folder carries it to inference."""
    sizes = {name: load_processor(trained(name).output).image_processor for name in ADAPTERS}
    assert sizes["qwen2_5_vl_sft"].size["longest_edge"] == 1280 * 28 * 28
    assert sizes["qwen3_5_sft"].size["longest_edge"] == 1024 * 32 * 32
    assert sizes["gemma4_sft"].max_soft_tokens == 280
    assert sizes["smolvlm_sft"].size["longest_edge"] == 2 * sizes["smolvlm_sft"].max_image_size["longest_edge"]
    assert sizes["internvl_sft"].max_patches == 6


@pytest.mark.parametrize("name", ["llava15_sft", "table_to_markdown_sft", *WHOLE])
def test_a_second_call_goes_on_from_the_checkpoint(
    name: str, trained: Callable[[str], Run], flags_of: Callable[[str], list[object]], tmp_path: Path
) -> None:
    first = trained(name)
    output = shutil.copytree(first.output, tmp_path / name)
    second = run(name, [*flags_of(name), "--max_steps", 3, "--output_dir", output])
    assert second.steps == 1
    assert second.trainer.state.global_step == 3
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (first.trainer, second.trainer)
    ]
    assert losses[1][:2] == losses[0]
    assert len(losses[1]) == 3


def test_stage_1_saves_the_chat_template_and_stage_2_takes_its_folder(
    trained: Callable[[str], Run], flags_of: Callable[[str], list[object]], parts: tuple[Path, Path], tmp_path: Path
) -> None:
    stage_1 = trained("llava_pretrain")
    ids = stage_1.trainer.data_collator([stage_1.trainer.eval_dataset[0]])["input_ids"][0]
    text = stage_1.trainer.processing_class.decode(ids)
    assert text.startswith("<s><image>")
    assert text.endswith(" .\n")
    assert "ASSISTANT" not in text
    assert "USER: " in load_processor(stage_1.output).chat_template

    model = ["--model_name_or_path", stage_1.output, "--max_steps", 1]
    with pytest.raises(ValueError, match=r"was assembled on 'clip' \(width 64.*'openai/clip-vit-base-patch32'"):
        run(
            "llava_finetune_full",
            [
                *(*flags_of("llava_finetune_full"), *model),
                *("--vision_tower", "openai/clip-vit-base-patch32", "--output_dir", tmp_path / "refused"),
            ],
        )
    assert not (tmp_path / "refused").exists()
    output = ["--vision_tower", parts[0], "--output_dir", tmp_path / "stage_2", "--mm_projector_lr", "0.003"]
    stage_2 = run("llava_finetune_full", [*flags_of("llava_finetune_full"), *model, *output])
    rates = {group["part"]: group["initial_lr"] for group in stage_2.trainer.optimizer.param_groups}
    assert rates == {"projector": 0.003, "language": 0.01, "head": 0.01}


@pytest.mark.parametrize("name", ["llava15_sft", "table_to_markdown_sft", *WHOLE])
def test_bfloat16_as_on_a_gpu(
    name: str, flags_of: Callable[[str], list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("hardware", "loading", "llava", "quantization"):
        monkeypatch.setattr(f"vlm_sft.models.{module}.best_dtype", lambda: torch.bfloat16)
    finished = run(name, [*flags_of(name), "--use_cpu", "--max_steps", 2, "--output_dir", tmp_path])
    weights = list(finished.trainer.model.parameters())
    packed = {torch.uint8} if name == "llava15_sft" else set()
    assert {weight.dtype for weight in weights if weight.requires_grad} == {torch.float32}
    assert {weight.dtype for weight in weights if not weight.requires_grad} == {torch.bfloat16} | packed
    assert finished.trainer.args.bf16
    assert math.isfinite(finished.metrics["eval_loss"])
    assert load_model(tmp_path).dtype == torch.bfloat16


def test_bodies_are_one_body() -> None:
    """What a recipe's `main` does differently from llava15_sft.py's: image sizes, and thinking."""

    def statements(name: str) -> list[str]:
        tree = ast.parse((ROOT / "recipes" / f"{name}.py").read_text("utf-8"))
        main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        return [ast.unparse(statement).replace(", max_pixels=args.max_pixels", "") for statement in main.body]

    shared = statements("llava15_sft")
    for name in ADAPTERS.keys() - {"table_to_markdown_sft"}:
        own = [statement for statement in statements(name) if statement not in shared]
        assert [statement for statement in statements(name) if statement in shared] == shared
        differ = ("processor.image_processor", "tiles", "processor.chat_template")
        assert all(statement.startswith(differ) for statement in own), name


# What a user gets wrong. Each is told before anything is written.


def changed(data: Path, folder: Path, change: Callable[[Dataset], Dataset]) -> Path:
    DatasetDict({split: change(rows) for split, rows in load_from_disk(data).items()}).save_to_disk(folder)
    return folder


def two_images_in_row_5(rows: Dataset, bad: Sequence[int] = (5,)) -> Dataset:
    features = rows.features
    twice = [row | {"images": row["images"] * (2 if n in bad else 1)} for n, row in enumerate(rows)]
    return Dataset.from_list(twice, features=features)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows.remove_columns("messages"), "no column of conversations among images; expected messages"),
        (lambda rows: rows.rename_column("messages", "mesages"), r"\(did you mean 'mesages'\?\); .*images=images"),
        (lambda rows: rows.select([]), "it holds no row"),
        (two_images_in_row_5, r"row 5\n +2 images"),
    ],
)
def test_bad_data(
    change: Callable[[Dataset], Dataset],
    told: str,
    flags_of: Callable[[str], list[object]],
    data: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = ["--dataset_name", changed(data("chats"), tmp_path / "data", change)]
    with pytest.raises(ValueError, match=told):
        run("llava15_sft", [*flags_of("llava15_sft"), *source, "--output_dir", tmp_path / "output"])
    assert not (tmp_path / "output").exists()


def test_columns_by_flag(flags_of: Callable[[str], list[object]], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (30, 30), "red").save(tmp_path / "pictures" / "red.png")
    rows = [{"ask": f"<image>\nNumber {n}: which colour?", "say": f"Red {n}.", "bild": "red.png"} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = ["--dataset_name", tmp_path / "rows.jsonl", "--image_folder", tmp_path / "pictures"]
    columns = ["--columns", "prompt=ask", "response=say", "images=bild"]
    length = ["--max_steps", 1, "--output_dir", tmp_path / "output"]
    assert run("llava15_sft", [*flags_of("llava15_sft"), *source, *columns, *length]).steps == 1


@pytest.mark.parametrize("what", ["error", "drop", "ignore"])
def test_a_recipe_runs_on_a_stream(
    what: str, flags_of: Callable[[str], list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "<image>\nWhich colour?", "response": f"Red {n}.", "image": "red.png"} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    source = [
        "--dataset_name",
        tmp_path / "rows.jsonl",
        "--columns",
        "prompt=prompt",
        "response=response",
        "images=image",
    ]
    stream = [
        "--streaming",
        "--num_eval_rows",
        2,
        "--on_bad_rows",
        what,
        "--max_steps",
        3,
        "--output_dir",
        tmp_path / "out",
    ]
    finished = run("llava15_sft", [*flags_of("llava15_sft"), *source, *stream])
    assert finished.steps == 3
    assert "a stream to train on, 2 held out" in capsys.readouterr().err


def test_one_row_alone(flags_of: Callable[[str], list[object]], tmp_path: Path) -> None:
    (tmp_path / "row.jsonl").write_text('{"prompt": "Well?", "response": "Yes."}', encoding="utf-8")
    source = ["--dataset_name", tmp_path / "row.jsonl", "--columns", "prompt=prompt", "response=response"]
    told = r"row\.jsonl: --num_eval_rows 1 of 1 rows leaves none to train on"
    with pytest.raises(ValueError, match=told):
        run("llava15_sft", [*flags_of("llava15_sft"), *source, "--num_eval_rows", 1, "--output_dir", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("what", "told"),
    [("ignore", "^row 5: 2 images"), ("drop", "more than --max_bad_fraction 0.1")],
)
def test_what_to_do_with_bad_rows(
    what: str, told: str, flags_of: Callable[[str], list[object]], data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = ["--dataset_name", changed(data("chats"), tmp_path / "data", partial(two_images_in_row_5, bad=(5, 6)))]
    output = ["--output_dir", tmp_path / "output"]
    with pytest.raises(ValueError, match=told):
        run("internvl_sft", [*flags_of("internvl_sft"), *source, *output, "--on_bad_rows", what])


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("/no/such/folder", "No folder '/no/such/folder'"),
        ("nobody/no-such-model", "'nobody/no-such-model'"),
        (None, "text-only model"),
    ],
)
def test_bad_model(
    model: str | None, told: str, flags_of: Callable[[str], list[object]], parts: tuple[Path, Path], tmp_path: Path
) -> None:
    source = ["--model_name_or_path", model or parts[1]]
    with pytest.raises(ValueError, match=told):
        run("llava15_sft", [*flags_of("llava15_sft"), *source, "--output_dir", tmp_path / "output"])
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("name", "flags"), [("llava15_sft", ["--lora_rank", "8"]), ("llava_finetune_full", ["--load_in_4bit"])]
)
def test_unknown_flag(name: str, flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=flags[0]):
        run(name, [*flags, "--output_dir", tmp_path / "output"])
    assert not (tmp_path / "output").exists()


def test_unknown_yaml_key(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lora_r: 8\nlora_rank: 8\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lora_rank"):
        run("llava15_sft", ["--config", tmp_path / "run.yaml", "--output_dir", tmp_path / "output"])
    assert not (tmp_path / "output").exists()


def test_4_bit_without_bitsandbytes(
    flags_of: Callable[[str], list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_sft.models.quantization.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        run("llava15_sft", [*flags_of("llava15_sft"), "--output_dir", tmp_path / "output"])
    assert not (tmp_path / "output").exists()


def test_checkpoint_of_another_model(
    trained: Callable[[str], Run],
    flags_of: Callable[[str], list[object]],
    tiny_dir: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    output = shutil.copytree(trained("llava_next_sft").output, tmp_path / "output")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(ValueError, match="belongs to another run") as refusal:
        run("llava15_sft", [*flags_of("llava15_sft"), "--max_steps", 3, "--output_dir", output])
    assert "model_type: recorded 'llava_next', now 'llava'" in str(refusal.value)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


# As users start them.


def launch(command: Sequence[object]) -> None:
    done = subprocess.run([str(word) for word in command], cwd=ROOT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.sweep
def test_accelerate_launch_on_two_processes(flags_of: Callable[[str], list[object]], tmp_path: Path) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    config = ["--config_file", "accelerate_configs/cpu_2proc.yaml", "recipes/llava15_sft.py"]
    flags = [*flags_of("llava15_sft"), "--use_cpu", "--max_steps", 2, "--output_dir", tmp_path / "output"]
    launch([*accelerate, *config, *flags])
    told = json.loads((tmp_path / "output" / "run.json").read_text("utf-8"))
    assert told["hardware"]["processes"] == 2
    assert verify_checkpoint(tmp_path / "output" / "checkpoint-2") == []


LAUNCHED = sorted({*ADAPTERS, *WHOLE} - {"llava15_sft"})  # that one on two processes in tests/test_distributed.py


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("name", LAUNCHED)
def test_accelerate_launch(name: str, flags_of: Callable[[str], list[object]], tmp_path: Path) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    config = ["--config_file", "accelerate_configs/single_gpu.yaml", f"recipes/{name}.py"]
    flags = [*flags_of(name), "--use_cpu", "--max_steps", 1, "--output_dir", tmp_path / "output"]
    launch([*accelerate, *config, *flags])
    told = json.loads((tmp_path / "output" / "run.json").read_text("utf-8"))
    assert math.isfinite(told["results"]["eval_loss"])
    assert verify_checkpoint(tmp_path / "output" / "checkpoint-1") == []


@pytest.mark.slow
def test_plain_python_with_every_default(
    tiny_dir: Callable[[str], Path], data: Callable[[str], Path], tmp_path: Path
) -> None:
    model = ["--model_name_or_path", tiny_dir("qwen2_5_vl"), "--dataset_name", data("charts")]
    output = ["--max_steps", 3, "--output_dir", tmp_path / "output"]
    launch([sys.executable, "recipes/qwen2_5_vl_sft.py", *model, *output])
    assert (tmp_path / "output" / "adapter_model.safetensors").is_file()
