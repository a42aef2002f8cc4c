"""What a run takes of each GPU's memory, by arithmetic from the model's config: no weight is downloaded.

    python -m vlm_sft memory --model llava-hf/llava-1.5-7b-hf --method qlora --gpus 1

On one H200 the peak of two models by QLoRA was 3% more and 4% less (benchmarks/README.md); the rest is arithmetic. A
run is said to fit where its peak is at most nine tenths of the memory, which leaves the rest to fragmentation."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from vlm_sft.common import base_of, on_meta
from vlm_sft.models.parts import part_of, parts_of

Method = Literal["qlora", "lora", "full", "projector"]
Strategy = Literal["ddp", "fsdp2", "zero2", "zero3"]

GIB = 2**30
# NF4 with double quantization: 4 bits, one 8-bit scale for 64 weights, one 32-bit scale for 256 of these (QLoRA,
# arXiv 2305.14314). A bfloat16 weight takes 2 bytes, a trained one 4: `cast_trainable_to_fp32`.
_NF4, _BF16, _TRAINED = (4 + 8 / 64 + 32 / (64 * 256)) / 8, 2, 4
_ADAM = {"adamw": 8, "adamw_8bit": 2}
# What the driver, CUDA's context and its libraries take: 0.99 to 1.06 GiB on an H200 (benchmarks/README.md), less on a
# smaller card. NCCL's buffers: a usual size, not of any measurement here.
_CONTEXT, _NCCL = 1.0 * GIB, 0.4 * GIB
_TILE = 4096, 32768  # tokens and words that TRL 1.16's head scores at a time (trainer/utils.py, kernels)


def estimate(
    model: Any,
    *,
    method: Method,
    gpus: int = 1,
    strategy: Strategy = "ddp",
    rows: int = 4,
    tokens: int = 2048,
    lora_r: int = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    optimizer: str = "adamw",
    checkpointing: bool = True,
    generation_batch_size: int | None = None,
    max_new_tokens: int = 64,
    trained: int | None = None,
) -> dict[str, float]:
    """Bytes on each of the GPUs, by purpose, and at the `peak`: of loading, of a step with `rows` of `tokens` at a
    time, or of answering `generation_batch_size` of them (default: `rows`, at most 8). `host`: in the memory of the
    CPU of a machine that has all the GPUs, besides the file of the weights.

    Trained in full are projector, language model and head, or the projector alone; adapters sit on the language model's
    linear layers. `trained` takes the place of the number of weights that follows from that.

    Raises ValueError for settings that do not go together."""
    if method == "qlora" and strategy == "zero3":
        raise ValueError("method='qlora' with strategy='zero3': DeepSpeed shards no 4-bit weights; take fsdp2")
    if strategy == "fsdp2" and optimizer != "adamw":
        raise ValueError(f"optimizer={optimizer!r} with strategy='fsdp2': bitsandbytes steps no sharded weights")
    parts, sizes, four_bit, text = parts_of(model), _sizes(model), method == "qlora", model.config.get_text_config()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    language = [m for name, m in linears.items() if part_of(name, parts) == "language"]
    lists = [m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and part_of(n, parts) == "language"]
    layers = [*max(lists, key=len)]
    largest = max(m.weight.numel() for m in linears.values()) * _BF16
    widest = max(m.out_features for m in language)
    packed = sum(m.weight.numel() for m in language) * four_bit

    taught, adapters = sizes.total() - sizes["vision"] if method == "full" else sizes["projector"], None
    if adapted := method in ("qlora", "lora"):
        taught = sum(lora_r * (m.in_features + m.out_features) + use_dora * m.out_features for m in language)
        # PEFT widens the input of a 16-bit layer, and so keeps another copy of it, as dropout does.
        apart = lora_dropout or (0.0 if four_bit else 1e-9)
        adapters = LoraConfig(r=lora_r, lora_dropout=apart, use_dora=use_dora) if lora_r else None
    taught = taught if trained is None else trained
    frozen = sizes.total() - packed - (0 if adapted else taught)
    held: float = frozen * _BF16 + packed * _NF4 + taught * _TRAINED
    gradients, states = float(taught * _TRAINED), float(taught * _ADAM[optimizer])
    gathered, host, load = 0.0, 0.0, held + largest
    if strategy == "zero2":
        held += taught * (_BF16 - _TRAINED + _TRAINED / gpus)  # 16-bit copies in each, 32-bit ones sharded
        gradients, states = gradients / gpus, states / gpus
    elif strategy in ("fsdp2", "zero3"):
        # Each process packs the whole model on the CPU; in 16 bit, the first holds what trains in 32.
        host = gpus * (packed * _NF4 + frozen * _BF16) if four_bit else taught * _TRAINED
        held, gradients, states = held / gpus, gradients / gpus, states / gpus
        load = held + max(p.numel() for p in model.parameters()) * _TRAINED
        # One layer at work and the next one on its way, the embedding, and the head as it is trained.
        layer = sum(p.numel() for p in layers[0].parameters()) * (_NF4 if four_bit else _BF16)
        ends = {*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()}
        gathered = 2 * layer + sum(p.numel() for p in ends) * _BF16 if gpus > 1 else 0.0
    elif gpus > 1:
        gathered = gradients  # the buckets in which DDP sums gradients up
    if strategy == "ddp" and not adapted:
        gathered += taught * _BF16  # autocast keeps its 16-bit copies of what trains until a forward has ended

    whole = rows * tokens * text.hidden_size
    inside = _kept(model, rows, tokens, adapters, trains=method == "full")
    if four_bit and use_dora and lora_dropout:
        inside += sum(m.weight.numel() for m in layers[0].modules() if isinstance(m, nn.Linear)) * _BF16  # dequantized
    kept = len(layers) * (whole * _BF16 if checkpointing else inside) + checkpointing * inside
    at_work = 2 * rows * tokens * widest * _BF16 + largest * four_bit  # gradients; one matrix unpacked
    head = min(rows * tokens, _TILE[0]) * min(text.vocab_size, _TILE[1]) * _BF16 + whole * (_BF16 + 4)
    head += (method == "full") * 4 * model.get_output_embeddings().weight.numel()
    asked = min(8, rows) if generation_batch_size is None else generation_batch_size
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * len(layers) * text.num_key_value_heads * width * _BF16 * (tokens + max_new_tokens)
    answers = asked * (cache + tokens * (2 * widest + 6 * text.hidden_size) * _BF16)
    context, tower = _CONTEXT + _NCCL * (gpus > 1), _tower(model, rows, tokens)
    step = gradients + kept + max(at_work, head, tower) + gathered
    found = {"context": context, "weights": held, "gradients": gradients, "optimizer": states}
    found |= {"activations": kept + at_work, "head": head, "tower": tower, "gathered": gathered}
    found |= {"answers": answers, "load": load, "host": host}
    return found | {"peak": context + max(load, held + states + max(step, answers))}


def _sizes(model: nn.Module) -> Counter[str]:
    """Part -> number of parameters."""
    sizes, parts = Counter[str](), parts_of(model)
    for name, parameter in model.named_parameters():
        sizes[part_of(name, parts)] += parameter.numel()
    return sizes


def _kept(model: Any, rows: int, tokens: int, adapters: LoraConfig | None, *, trains: bool) -> int:
    """Bytes that one layer of the language model keeps for its backward, as autograd counts them on PyTorch's meta
    device: what a model of two layers keeps more than one of one. The meta device has plain attention alone: its scores
    are left out, since SDPA and FlashAttention keep none, and what it widens counts as the 16 bit it has there."""

    def kept_by(layers: int) -> int:
        config = copy.deepcopy(model.get_decoder().config)
        config.num_hidden_layers, config._attn_implementation = layers, "sdpa"
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        kept: dict[int, tuple[Any, int]] = {}  # by storage, which stays alive here, so that none has its place

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            widened = tensor.dtype == torch.float32 and tensor.shape[:-2] == (rows * config.num_attention_heads,)
            if tensor.shape[-2:] != (tokens, tokens):
                kept[storage._cdata] = storage, storage.nbytes() // (2 if widened else 1)
            return tensor

        with torch.device("meta"):
            decoder: Any = AutoModel.from_config(config).requires_grad_(trains)  # type: ignore[no-untyped-call]
            if adapters is not None:
                adapters.target_modules = [n for n, m in decoder.named_modules() if isinstance(m, nn.Linear)]
                decoder = get_peft_model(decoder, adapters)
            decoder.to(torch.bfloat16).train()
            mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
            given = torch.empty(rows, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                decoder(inputs_embeds=given, attention_mask=mask, use_cache=False)
        weights = {weight.untyped_storage()._cdata for weight in decoder.parameters()}
        return sum(size for place, (_, size) in kept.items() if place not in weights)

    return kept_by(2) - kept_by(1)


def _tower(model: Any, rows: int, tokens: int) -> float:
    """A layer of the frozen tower at work on an image for each row; where its size is free (Qwen-VL), on one that fills
    two thirds of the row at four patches a token."""
    vision = model.config.vision_config
    edges = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    size, patch = (edge[0] if isinstance(edge, (list, tuple)) else edge for edge in edges)
    patches = (size // patch) ** 2 if size else 4 * tokens * 2 // 3
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    between = getattr(vision, "intermediate_size", None) or 4 * width
    return float(rows * patches * (2 * between + 6 * width) * _BF16)


def of_run(trainer: Any, tokens: int) -> str:
    """The estimate for this trainer's own run, of rows of at most so many tokens, beside what its GPU has free."""
    model, args, plugin = base_of(trainer.model), trainer.args, trainer.accelerator.state.deepspeed_plugin
    config, how = copy.deepcopy(model.config), {}
    quantized = config.__dict__.pop("quantization_config", None) is not None
    trained = {name: weight.numel() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    method = "full" if any(part_of(name, parts_of(model)) == "language" for name in trained) else "projector"
    if adapters := next(iter(getattr(trainer.model, "peft_config", {}).values()), None):
        method = "lora"
        how = {"lora_r": adapters.r, "lora_dropout": adapters.lora_dropout, "use_dora": adapters.use_dora}
    strategy: Any = "fsdp2" if trainer.is_fsdp_enabled else f"zero{plugin.zero_stage}" if plugin else "ddp"
    found = estimate(
        on_meta(config),
        method="qlora" if quantized else method,  # type: ignore[arg-type]
        gpus=args.world_size,
        strategy=strategy,
        rows=args.per_device_train_batch_size,
        tokens=tokens,
        optimizer="adamw_8bit" if "8bit" in args.optim.value else "adamw",
        checkpointing=args.activation_checkpointing,
        generation_batch_size=getattr(args, "generation_batch_size", None),
        trained=sum(trained.values()),
        **how,
    )
    free, total = torch.accelerator.get_memory_info()
    free += torch.accelerator.memory_reserved()  # this process's own, such as the weights
    free += int(min(found["context"], total - free))  # and its context
    verdict = "" if found["peak"] <= free else "; it may not fit: halve the batch, or python -m vlm_sft memory"
    kinds = ", ".join(f"{name} {found[name] / GIB:.1f}" for name in ("weights", "optimizer", "activations", "answers"))
    beside = f"{free / GIB:.1f} GiB of {total / GIB:.1f} are free{verdict}"
    return f"{found['peak'] / GIB:.1f} GiB at the peak, estimated ({kinds}); {beside}"


def report(model_name_or_path: str, *, gpu_memory: float | None, gpus: int, **options: Any) -> tuple[str, bool]:
    """The estimate for the model of this name as text, and whether it fits a GPU of so many GiB (None: this one).

    `options` are those of `estimate`."""
    model = on_meta(AutoConfig.from_pretrained(model_name_or_path))
    found = estimate(model, gpus=gpus, **options)
    if gpu_memory is None:
        gpu_memory = torch.accelerator.get_memory_info()[1] / GIB if torch.accelerator.is_available() else 80.0
    fits = found["peak"] <= 0.9 * gpu_memory * GIB
    sizes = ", ".join(f"{part} {size:,}" for part, size in _sizes(model).items())
    lines = [f"{name:12}{value / GIB:9.2f} GiB" for name, value in found.items()]
    verdict = f"{'fits' if fits else 'does not fit'} on {gpus} x {gpu_memory:g} GiB (a tenth kept free)"
    return "\n".join([f"parameters  {sizes}", *lines, verdict]), fits
