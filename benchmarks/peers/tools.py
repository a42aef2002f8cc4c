"""The four tools: their environments, and the flags of each in its default setting and in its best honest one.

The same in all: LoRA of rank 8 without dropout, batches of 8 rows, one epoch, float32, learning rate, length limit.
`best` adds what its documentation offers for a faster step or for labels of answers alone; a tool whose defaults are
its best has no second setting.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = {
    "llama_factory": ["llamafactory==0.9.5", "bitsandbytes==0.50.2"],
    "ms_swift": ["ms-swift==4.6.0", "qwen-vl-utils", "torchvision==0.28.0", "bitsandbytes==0.50.2"],
}
NAMES = {"vlm_sft": "vlm_sft", "trl": "TRL", "llama_factory": "LLaMA-Factory", "ms_swift": "ms-swift"}
SETTINGS = {"vlm_sft": ("default",), "trl": ("default", "best"), "llama_factory": ("default", "best")}
SETTINGS["ms_swift"] = ("default", "best")
STARTS = [(tool, settings[-1]) for tool, settings in SETTINGS.items()]
STARTS.insert(1, ("vlm_sft", "streaming"))
LANGUAGE = r".*language_model.*(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Job:
    """One training: `data` holds the rows in every tool's form, `model` is one of the three twins. `first_step_only`:
    it ends there."""

    tool: str
    setting: str
    model: Path
    data: Path
    output: Path
    checkpointing: bool = False
    four_bit: bool = False
    max_length: int = 4096
    first_step_only: bool = False

    def flags(self) -> list[str]:
        common = {
            "model_name_or_path" if self.tool != "ms_swift" else "model": self.model,
            "output_dir": self.output,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "num_train_epochs": 1,
            "learning_rate": 1e-4,
            "seed": 0,
            "report_to": "none",
            "save_strategy": "no",
            "lora_dropout": 0,
            "lora_alpha": 32,
        }
        own, switches = getattr(self, f"_{self.tool}")()
        flags = [str(part) for name, value in (common | own).items() for part in (f"--{name}", value)]
        return [*flags, *(f"--{switch}" for switch in switches)]

    def _vlm_sft(self) -> tuple[dict[str, object], list[str]]:
        own = {
            "dataset_name": self.data / "rows.jsonl",
            "num_eval_rows": 0,  # all rows train, as in the others
            "lora_r": 8,
            "max_length": self.max_length,
            "activation_checkpointing": self.checkpointing,
        }
        if self.setting == "streaming":  # rows are checked as they come
            own["max_steps"] = 40  # which a stream has to be told: one epoch of 320 rows
        switches = ["streaming"] * (self.setting == "streaming")
        return own, switches if self.four_bit else [*switches, "no_load_in_4bit"]

    def _trl(self) -> tuple[dict[str, object], list[str]]:
        best = self.setting == "best"
        own = {
            "dataset_name": self.data / "trl",
            "lora_r": 8,
            "lora_target_modules": LANGUAGE if best else "all-linear",  # as in the head of examples/scripts/sft_vlm.py
            "bf16": False,  # its default needs a GPU
            "max_length": self.max_length,
            "activation_checkpointing": self.checkpointing,
        }
        switches = ["use_peft", *["load_in_4bit"] * self.four_bit]
        if best:
            own |= {"dataloader_num_workers": 1}
            switches += ["assistant_only_loss"]
        return own, switches

    def _llama_factory(self) -> tuple[dict[str, object], list[str]]:
        own = {
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "lora_rank": 8,
            "template": "qwen2_vl" if "Qwen" in self.model.name else "llava",
            "dataset": "rows",
            "dataset_dir": self.data,
            "cutoff_len": self.max_length,
            "disable_gradient_checkpointing": not self.checkpointing,
            **({"quantization_bit": 4} if self.four_bit else {}),
        }
        if self.setting == "best":
            own |= {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 1}
        return own, []

    def _ms_swift(self) -> tuple[dict[str, object], list[str]]:
        kind = "qwen2_5_vl" if "Qwen" in self.model.name else "llava1_5_hf"
        own = {
            "model_type": kind,
            "template": kind,
            "dataset": self.data / "rows.jsonl",
            "tuner_type": "lora",
            "lora_rank": 8,
            "torch_dtype": "float32",
            "max_length": self.max_length,
            "gradient_checkpointing": self.checkpointing,
            **({"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_compute_dtype": "float32"} if self.four_bit else {}),
        }
        if self.setting == "best":
            own |= {"group_by_length": True}
        return own, []

    def run(self, python: Path, home: Path) -> subprocess.CompletedProcess[str]:
        """In a process of its own, offline; `home` is the folder of its caches."""
        child = Path(__file__).with_name("child.py")
        shim = [str(ROOT / "tests" / "torchvision_cpu"), *([str(ROOT)] if self.tool == "vlm_sft" else [])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(shim),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": str(home),
            "MODELSCOPE_CACHE": str(home / "modelscope"),
            "HF_HUB_OFFLINE": "1",
            "USE_HF": "1",
            "MAX_PIXELS": str(224 * 224),  # of ms-swift, the twin's own limit
            "FIRST_STEP_ONLY": "1" * self.first_step_only,  # of child.py
        }
        recipe = [str(ROOT / "recipes" / "llava_next_sft.py")] if self.tool == "vlm_sft" else []
        command = [python, child, self.output.with_suffix(".json"), self.tool, *recipe, *self.flags()]
        return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, cwd=home)


def python_of(tool: str, folder: Path) -> Path:
    """The interpreter of the tool, whose environment is made where it is missing. torch is the release that
    requirements.txt names, in whatever build pip finds for it."""
    if tool not in ENVIRONMENTS:
        return Path(sys.executable)
    python = folder / tool / "bin" / "python"
    done = folder / tool / ".installed"
    if not done.exists():
        [torch] = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch==")]
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder / tool], check=True)
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        subprocess.run([*pip, torch, *ENVIRONMENTS[tool]], check=True)
        # LLaMA-Factory imports torchaudio, whose wheel is a CUDA build: without its binary it loads beside any torch.
        for binary in folder.glob(f"{tool}/lib/python*/site-packages/torchaudio/lib/*.so"):
            binary.unlink()
        done.touch()
    return python
