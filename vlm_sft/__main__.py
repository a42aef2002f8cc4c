"""The command `vlm-sft`, also `python -m vlm_sft`: it ends with 0 where all is well, and tells an error in one line."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_sft.chat import audit as auditing
from vlm_sft.chat.collator import ChatCollator
from vlm_sft.command_line import TRACEBACK, OneLineErrors
from vlm_sft.data.check_rows import check_report
from vlm_sft.data.datasets import load_conversations
from vlm_sft.evaluation.pages import write_audit_html
from vlm_sft.models.loading import load_processor, read_config
from vlm_sft.models.parts import parts_of
from vlm_sft.tools import memory as estimates
from vlm_sft.tools import merging
from vlm_sft.tools.tiny import save, save_like


def audit(options: argparse.Namespace) -> None:
    """What would be trained: each token of some rows, as the model's processor has them."""
    print(f"{'parts':<9}{parts_of(read_config(options.model))}")
    collator = ChatCollator(load_processor(options.model), train_on=options.train_on)
    report = auditing.audit(collator, _rows(options), num_rows=options.num_rows)
    print(report)
    if options.html:
        write_audit_html(report, options.html)


def check(options: argparse.Namespace) -> int:
    """Is every row as it should be? The bad rows of a dataset, by reason."""
    if options.max_length and not options.model:
        raise ValueError("--max_length counts tokens, so it needs --model")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or the tokenizer warns in each process
    collator = ChatCollator(load_processor(options.model), max_length=options.max_length) if options.model else None
    report = check_report(_rows(options, split=options.split), collator, num_proc=options.num_proc)
    print(report)
    if options.to_jsonl:
        report.to_jsonl(options.to_jsonl)
    return 1 if report.faults else 0


def _rows(options: argparse.Namespace, **which: Any) -> Any:
    where = {name: getattr(options, name) for name in ("columns", "prompt", "system_prompt", "image_folder")}
    where |= {"config_name": options.dataset_config, "allow_outside": options.allow_outside}
    return load_conversations(options.dataset, eval_fraction=0, **where, **which)["train"]


def copy(options: argparse.Namespace) -> None:
    """A recipe and the configs of accelerate, written into this folder to be changed."""
    package = Path(__file__).parent
    home = package if (package / "recipes").is_dir() else package.parent  # installed, or a checkout
    recipes = {path.stem: path for path in sorted((home / "recipes").glob("*.py"))}
    if options.recipe not in recipes:
        raise ValueError(f"no recipe is called {options.recipe!r}; there are {', '.join(recipes)}")
    if (own := Path(recipes[options.recipe].name)).exists():
        raise ValueError(f"{own} is here already; rename it, or go to another folder")
    shutil.copy(recipes[options.recipe], own)
    configs = shutil.copytree(home / "accelerate_configs", "accelerate_configs", dirs_exist_ok=True)
    print(f"{own} and {configs}/. Edit the first, and run: accelerate launch {own} --dataset_name DATA")


def merge(options: argparse.Namespace) -> None:
    """An adapter merged into its base, written only if it answers as adapter on base does."""
    print(merging.merge(**vars(options)))


def memory(options: argparse.Namespace) -> int:
    """Does a run fit? Estimated from the model's config; 1 if it does not."""
    text, fits = estimates.report(vars(options).pop("model"), **vars(options))
    print(text)
    return 0 if fits else 1


def tiny(options: argparse.Namespace) -> None:
    """A small random twin of a model family, or of any model, to try a recipe on."""
    if (options.family is None) == (options.like is None):
        raise ValueError("give FAMILY DIR, or --like MODEL DIR")
    print(save(options.family, options.folder) if options.family else save_like(options.like, options.folder))


def main(arguments: Sequence[str] | None = None) -> int:
    prefix = ""
    try:
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int | None] = vars(options).pop("command")
        prefix = f"{command.__name__}: "
        return command(options) or 0
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"{prefix}{error}", file=sys.stderr)
        return 1


class _Parser(OneLineErrors, argparse.ArgumentParser):
    """Tells a mistake in one line."""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vlm-sft", description="Commands around a run; also as python -m vlm_sft.")
    commands = parser.add_subparsers(required=True, metavar="audit|check|copy|merge|memory|tiny")
    flags = {}
    for command in (audit, check, copy, merge, memory, tiny):
        added = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        added.set_defaults(command=command)
        flags[command.__name__] = added.add_argument
    for name in ("audit", "check"):
        flag = flags[name]
        flag("--model", required=name == "audit", help="Hub id or folder; only its processor is loaded")
        flag("--dataset", required=True, help="Hub id, file or folder")
        flag("--columns", nargs="*", metavar="FIELD=COLUMN", help="as in prompt=question")
        flag("--prompt", help="the question of rows that have none, such as images with captions")
        flag("--system_prompt", help="the system message of rows that have none")
        flag("--image_folder", help="what file names in rows are relative to")
        flag("--allow_outside", action="store_true", help="read image files outside that folder as well")
        flag("--dataset_config", help="config of a Hub id, or name in a dataset_info.json")
    flag = flags["audit"]
    flag("--train_on", default="assistant", choices=["assistant", "last_assistant", "all"])
    flag("--num_rows", type=int, default=64, help="how many rows, evenly spread")
    flag("--html", metavar="FILE", help="write a page with each row's images and tokens")
    flag = flags["check"]
    flag("--split", default="train")
    flag("--max_length", type=int, help="rows of more tokens are bad (needs --model)")
    flag("--num_proc", type=int, help="processes (default: one per core)")
    flag("--to_jsonl", metavar="FILE", help="write the faults, one on each line")
    flags["copy"]("recipe", metavar="NAME", help="such as llava15_sft; a wrong name lists them all")
    flag = flags["merge"]
    flag("adapter", metavar="ADAPTER", help="the folder that training saved the adapter in")
    flag("out", metavar="OUT", help="a folder that does not exist yet")
    flag("--base", choices=["as-trained", "original"], default="as-trained", help="the weights to merge into")
    flag("--base_model", help="where the base is now, if it has moved")
    flag("--dtype", choices=["float32", "float16", "bfloat16"], help="of the result; by default the base's in training")
    flag("--trust_remote_code", action="store_true", help="run code from the base's repository")
    flag = flags["memory"]
    flag("--model", required=True, help="Hub id or folder; only its config is read")
    flag("--method", choices=["qlora", "lora", "full", "projector"], default="qlora")
    flag("--gpus", type=int, default=1, help="on all machines together")
    flag("--strategy", choices=["ddp", "fsdp2", "zero2", "zero3"], default="ddp")
    flag("--rows", type=int, default=4, help="per_device_train_batch_size")
    flag("--tokens", type=int, default=2048, help="of the longest row, images included")
    flag("--lora_r", type=int, default=16)
    flag("--lora_dropout", type=float, default=0.05)
    flag("--use_dora", action="store_true")
    flag("--generation_batch_size", type=int, help="rows answered at a time (default: --rows, at most 8)")
    flag("--max_new_tokens", type=int, default=64, help="of an answer")
    flag("--optimizer", choices=["adamw", "adamw_8bit"], default="adamw")
    flag("--no_checkpointing", dest="checkpointing", action="store_false", help="without activation checkpointing")
    flag("--gpu_memory", type=float, help="GiB of each GPU (default: this machine's, or 80)")
    flag = flags["tiny"]
    flag("--like", metavar="MODEL", help="Hub id or folder of the model to be like; its weights are not read")
    flag("family", metavar="FAMILY", nargs="?", help="such as llava15 or qwen2_5_vl; a wrong name lists them all")
    flag("folder", metavar="DIR", help="a new or empty folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
