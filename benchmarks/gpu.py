"""The side-by-side runs on one GPU, on random weights of the real sizes of LLaVA-1.5-7B and Qwen2.5-VL-7B, and the peak
memory of QLoRA: `python benchmarks/gpu.py`, in under nine minutes on an H200; nothing is downloaded.

    python benchmarks/gpu.py [--rows 96] [--runs 2] [--tiny]

`--tiny` takes tiny sizes, to try the program itself where there is no GPU. MFU counts the arithmetic of the real tokens
through the language model, forward and backward without recomputing, and of the patches through the tower, forward; of
`--peak_tflops`, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import mix
import torch
import training
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlavaConfig, Qwen2_5_VLConfig

import vlm_sft
from vlm_sft import IGNORE_INDEX, ChatCollator
from vlm_sft.models.freezing import detach_frozen_tower
from vlm_sft.models.parts import part_of, parts_of
from vlm_sft.models.quantization import check_quantized
from vlm_sft.tools import tiny

PATHS = ("trl", "note", "recipe")
# config.json of llava-hf/llava-1.5-7b-hf and Qwen/Qwen2.5-VL-7B-Instruct; the token ids are those of the twins.
LLAVA = {
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "image_seq_length": 576,
}
QWEN = {
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llava-1.5-7b": ("llava15", LlavaConfig, LLAVA),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", Qwen2_5_VLConfig, QWEN),
}


def build(name: str, small: bool) -> tuple[Any, Any]:
    """Random weights of the real sizes, in bfloat16 on the GPU, and a processor with a small vocabulary."""
    family, config_class, settings = MODELS[name]
    edge = 56 if small else {"llava15": 336, "qwen2_5_vl": 448}[family]
    twin, processor = tiny.build(family, image_size=edge, patch_size=14, corpus=[" ".join(mix.WORDS)])
    if small:
        return twin, processor
    ids = {key: value for key, value in twin.config.to_dict().items() if key.endswith(("token_id", "token_index"))}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForImageTextToText.from_config(config_class(**settings, **ids), dtype=torch.bfloat16)
    model.generation_config = twin.generation_config
    return model, processor


def one(name: str, path: str, folder: Path, small: bool) -> dict[str, Any]:
    return asdict(training.run(path, partial(build, name, small), folder))


def qlora(name: str, small: bool, tokens: int = 2048) -> dict[str, Any]:
    """Peak memory of training steps of one row of `tokens` tokens, NF4 with double quantization and LoRA of rank 16."""
    model, processor = build(name, small)
    config, weights = model.config, {key: value.cpu() for key, value in model.state_dict().items()}
    kind, dtype = type(model), model.dtype
    del model
    quantization: BitsAndBytesConfig = vlm_sft.nf4_config(config, compute_dtype=torch.bfloat16)
    place = {"": 0} if torch.cuda.is_available() else None
    model = kind.from_pretrained(
        None, config=config, state_dict=weights, quantization_config=quantization, device_map=place, dtype=dtype
    )
    print(check_quantized(model), file=sys.stderr)
    del weights
    detach_frozen_tower(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    adapted = get_peft_model(model, vlm_sft.lora_config(model, r=16)).train()
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-4)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    picture = mix.Image.new("RGB", (336, 336))
    words = " ".join(["the"] * (100 if small else tokens - 600))
    row = {"messages": [*talk, {"role": "assistant", "content": words}], "images": [picture]}
    batch = {key: value.to(model.device) for key, value in ChatCollator(processor)([row]).items()}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        adapted(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {"tokens": batch["input_ids"].shape[1], "peak_gib": peak}


def in_a_process(*arguments: object) -> dict[str, Any]:
    """What the last line of `python gpu.py --one ...` says: each run has a GPU without leftovers."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96, help="of each run")
    parser.add_argument("--runs", type=int, default=2, help="of each path")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU in bfloat16; default: H100, H200")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "PATH", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, path, folder = args.one
        result = qlora(name, args.tiny) if path == "qlora" else one(name, path, Path(folder), args.tiny)
        print(json.dumps(result))
        return
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("no GPU is visible; --tiny tries the program without one")
    flags = ["--tiny"] if args.tiny else []
    where = "the CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    print(f"On {where}, {'tiny' if args.tiny else 'real'} sizes, {args.rows} rows, batches of {training.BATCH}\n")
    print("| | trained tokens/s | x TRL | MFU | peak, GiB | first step, s |\n|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        data = mix.rows(args.rows)
        data.save_to_disk(f"{folder}/rows")
        for name in MODELS:
            work, answers = arithmetic(name, args.tiny, data)
            runs: dict[str, list[dict[str, Any]]] = {path: [] for path in PATHS}
            for _ in range(args.runs):
                for path in PATHS:
                    runs[path].append(in_a_process(name, path, f"{folder}/rows", *flags))
            times = {path: median(run["epochs"][-1] for run in those) for path, those in runs.items()}
            for path, those in runs.items():
                done = sum(cost * those[0][unit] for unit, cost in work.items()) / times[path]
                print(
                    f"| {name}, {path} | {answers / times[path]:,.0f} | {times['trl'] / times[path]:.2f} "
                    f"| {done / args.peak_tflops / 1e12:.1%} | {max(run['peak'] for run in those) / 1024:.1f} "
                    f"| {median(run['first_step'] for run in those):.1f} |",
                    flush=True,
                )
        found = in_a_process("llava-1.5-7b", "qlora", "-", *flags)
        peak = "-" if found["peak_gib"] is None else f"{found['peak_gib']:.2f}"
        print(f"\nQLoRA of llava-1.5-7b, one row of {found['tokens']:,} tokens: peak {peak} GiB")


def arithmetic(name: str, small: bool, data: Any) -> tuple[dict[str, float], int]:
    """Operations for each real token and each patch, and the trained tokens of the rows."""
    family, config_class, settings = MODELS[name]
    twin, processor = tiny.build(family, image_size=56, patch_size=14, corpus=[" ".join(mix.WORDS)])
    model = twin
    if not small:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config_class(**settings))
    parts, sizes = parts_of(model), {"vision": 0, "language": 0, "head": 0, "projector": 0}
    for weight_name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed_tokens" not in weight_name:
            sizes[part_of(weight_name, parts)] += weight.numel()
    rows = ChatCollator(processor).encode(list(data))[0]
    trained = sum(int((row.labels != IGNORE_INDEX).sum()) for row in rows)
    return {"real": 4.0 * (sizes["language"] + sizes["head"]), "patches": 2.0 * sizes["vision"]}, trained


if __name__ == "__main__":
    main()
