"""What every recipe's two dataclasses build on: flags whose reading is noted, and settings that change no number."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import whoami
from transformers import TrainingArguments
from trl import SFTConfig  # type: ignore[attr-defined]

from vlm_sft.distributed import on_main, print_main
from vlm_sft.models.hardware import best_worker_count, set_hardware_defaults
from vlm_sft.models.loading import first_line
from vlm_sft.upstream import use_one_gpu

# What SFTConfig adds to the Trainer's arguments and still acts when the rows are made by a collator of one's own
# (trl 1.16). `max_length` acts through the collator, with which `prove` compares it.
_ACTING = {"max_length", "loss_type", "activation_offloading", "router_aux_loss_coef"}
# The optimizers that read what is for some of them alone (transformers 5.23, trainer_optimizer.py).
_READ_BY = {
    "optim_args": "sgd|adagrad|rmsprop|ademamix|grok|anyprecision|torch_[48]bit|schedule_free|stable|galore|apollo",
    "optim_target_modules": "galore|apollo",
}


class Arguments:
    """Base of a recipe's `RecipeArguments`: notes which flags are read, so that `prove` can refuse one that no line of
    the recipe reads. A flag without effect would be a promise not kept."""

    def __getattribute__(self, name: str) -> Any:
        if name in type(self).__dict__.get("__dataclass_fields__", ()):
            self.__dict__.setdefault("_read", set()).add(name)
        return super().__getattribute__(name)


@dataclass
class ReadingArguments(Arguments):
    """The flags of whatever reads a dataset; `reading` are the keywords of `load_conversations` that they set."""

    dataset_config: str | None = field(
        default=None, metadata={"help": "Config of a Hub id; name in dataset_info.json."}
    )
    columns: list[str] | None = field(default=None, metadata={"help": "Your columns, as in prompt=ask response=say."})
    prompt: str | None = field(default=None, metadata={"help": "The question of rows without one (image and caption)."})
    system_prompt: str | None = field(default=None, metadata={"help": "The system message of rows without one."})
    image_folder: str | None = field(default=None, metadata={"help": "What file names are relative to, if elsewhere."})
    allow_outside: bool = field(default=False, metadata={"help": "Read image files outside that folder as well."})

    @property
    def reading(self) -> dict[str, Any]:
        names = ("columns", "prompt", "system_prompt", "image_folder", "allow_outside")
        return {"config_name": self.dataset_config, **{name: getattr(self, name) for name in names}}


@dataclass
class DataArguments(ReadingArguments):
    """The flags of a recipe for the rows that it trains on; `checking` are the keywords of `check_rows`."""

    streaming: bool = field(default=False, metadata={"help": "Read rows as they come; needs --max_steps."})
    num_eval_rows: int | None = field(
        default=None, metadata={"help": "Held-out rows (500, at most a fifth); 0 trains without evaluation."}
    )
    on_bad_rows: Literal["error", "drop", "ignore"] = field(
        default="error", metadata={"help": "What happens to bad rows."}
    )
    max_bad_fraction: float = field(default=0.1, metadata={"help": "How many rows --on_bad_rows drop may drop."})

    @property
    def reading(self) -> dict[str, Any]:
        return {**super().reading, "streaming": self.streaming, "max_eval_rows": self.num_eval_rows}

    @property
    def checking(self) -> dict[str, Any]:
        return {"on_bad_rows": self.on_bad_rows, "max_bad_fraction": self.max_bad_fraction}


def unread_flags(args: Any) -> list[str]:
    """Names of the flags that nothing has read yet."""
    return [f.name for f in fields(args) if f.name not in vars(args).get("_read", ())]


@dataclass
class RecipeDefaults(SFTConfig):
    """SFTConfig with the settings that recipes share. None of them changes a trained number: how rows are loaded, when
    a run evaluates and saves, how many checkpoints are kept, whether activations are kept or computed again.

    `set_hardware_defaults` fills in precision and optimizer; `hardware_changes` says what it replaced. Without a
    launcher one GPU of several is used, and a line says how to use all.

    Without evaluations or saves there is no best model to load. Raises ValueError for an output folder that this locale
    cannot spell, and for a push to the Hub that could not be made."""

    # For load_model, as in sdpa or flash_attention_2; None: the best that runs here
    attn_implementation: str | None = None
    # None: as many rows as in training
    per_device_eval_batch_size: int | None = None  # type: ignore[assignment]
    # Rows answered at a time; None: as many as are evaluated, at most 8, so that their cache takes less than a step
    generation_batch_size: int | None = None
    activation_checkpointing: bool | None = True  # less memory for some 20% of time
    eval_on_start: bool = True  # the answers before training, for samples.html
    eval_strategy: str = "steps"
    # None: as often as evaluations, so that the best is there to load
    save_steps: float | None = None  # type: ignore[assignment]
    save_total_limit: int | None = 3  # the newest, the one before it, the best
    dataloader_num_workers: int = field(default_factory=best_worker_count)  # images are decoded there
    # Needless, since each batch has an image (a blank one where no row has): DDP looks through the graph at each step
    ddp_find_unused_parameters: bool | None = False
    remove_unused_columns: bool = False  # keeps `row`, by which errors name a row, and `length`
    report_to: str = "none"

    def __post_init__(self) -> None:
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.generation_batch_size is None:
            self.generation_batch_size = min(8, self.per_device_eval_batch_size)
        if self.save_steps is None:
            self.save_steps = self.eval_steps or 500
        self.run_name = self.run_name or Path(str(self.output_dir)).name
        self.hardware_changes = []
        if self.load_best_model_at_end and "no" in (idle := (self.eval_strategy, self.save_strategy)):
            self.load_best_model_at_end = False
            what = ("eval", "save")[idle.index("no")]
            self.hardware_changes.append(f"the last weights are kept, as --{what}_strategy is no")
        self.hardware_changes += set_hardware_defaults(self)
        try:
            str(self.output_dir).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"--output_dir {str(self.output_dir)!a} is not spelled in the characters of this locale "
                f"({sys.getfilesystemencoding()}), and the weights could not be written: set PYTHONUTF8=1"
            ) from None
        super().__post_init__()  # type: ignore[no-untyped-call]
        if use_one_gpu(self):
            config = "--config_file accelerate_configs/multi_gpu.yaml"
            how = f"accelerate launch {config} --num_processes {torch.cuda.device_count()} RECIPE"
            print_main(f"Several GPUs, one process: training on the first. To use all: {how}")
        refuse_inert_settings(self)
        if self.push_to_hub:
            on_main(_check_login)


def _check_login() -> None:
    """Raises ValueError before anything is loaded, where the Trainer would fail once all is."""
    try:
        whoami()
    except Exception as error:  # no token, a wrong one, no network, each by classes of its own
        found = f"--push_to_hub: the Hub cannot be reached, or knows no login ({first_line(error)})"
        how = "Log in with `hf auth login` or set HF_TOKEN, or leave it out and upload the folder afterwards"
        raise ValueError(f"{found}. {how}") from error


def refuse_inert_settings(args: Any) -> None:
    """Raises `ValueError` for every setting of SFTConfig that has no effect here, since `ChatCollator` makes the labels
    and `check_rows` reads the rows, and for what the optimizer does not read."""
    inherited = {f.name for f in fields(TrainingArguments)}
    defaults = {f.name: f.default for f in fields(SFTConfig) if f.name not in inherited | _ACTING}
    # None stands for a default as well: SFTConfig itself puts it in the place of some.
    found = {n: value for n, default in defaults.items() if (value := getattr(args, n, None)) not in (default, None)}
    optim = str(getattr(args.optim, "value", args.optim))
    found |= {n: v for n, optims in _READ_BY.items() if (v := getattr(args, n)) and not re.search(optims, optim)}
    if found:
        flags = ", ".join(f"--{name} {value}" for name, value in found.items())
        them = "it" if len(found) == 1 else "them"
        raise ValueError(f"without effect here: {flags}. {_instead(found, optim)}; leave {them} out")


def _instead(found: Mapping[str, Any], optim: str) -> str:
    if found.keys() & {"assistant_only_loss", "completion_only_loss"}:
        return "ChatCollator decides what is trained (train_on=...)"
    if found.keys() & {"packing", "padding_free", "eval_packing", "packing_strategy"}:
        return "padding-free rows are the collator's padding_free=True, packs are made by vlm_sft.pack"
    if found.keys() & {"pad_token", "eos_token", "chat_template_path"}:
        return "the processor decides tokens and template: change it before the collator is made"
    if found.keys() & _READ_BY.keys():
        return f"--optim {optim} reads no such (sgd and ademamix read --optim_args, galore_adamw and apollo_adamw both)"
    return "The collator and the loader of the recipe take the place of what it would change"
