"""Every private or fragile name of our dependencies that we touch, with its version and why.

Each function here works round one fault, or reads one thing that has no public name. tests/test_upstream.py shows each
fault on a small case and goes red when the name is gone, or when the fault is, so that the function can go too. It also
holds what these modules rely on in place (transformers 5.23, accelerate 1.15, TRL 1.16, datasets 5.2):

- training/batches.py: batch_size, lengths and generator of LengthGroupedSampler, seed and set_epoch of
  BatchRebalanceSampler, below accelerate's batch samplers: to order rows by seed and epoch.
- training/optim.py: `optimizer_cls_and_kwargs` may hold a callable that makes the optimizer of a model, and
  `get_decay_parameter_names` reads nothing of its Trainer: for rates by part.
- training/callbacks.py: `log_probs` [B, T - 1] of TRL's fused head, to name the row of a NaN.
- training/neftune.py: `neftune_hook_handle` of the Trainer, whose noise counts padding.
- training/config.py: which optimizers read `optim_args` and `optim_target_modules`; checks.py: `_formatting_func`.
- data/check_rows.py, proof.py: `Dataset._fingerprint`, to know rows again.
- evaluation/callback.py, training/callbacks.py: callbacks run in the order of `callback_handler.callbacks`, and an
  evaluation before the save of its step: answers are scored, then the random state is put back."""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from jinja2 import TemplateError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.chat_template_utils import _get_template_variables
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available
from trl.trainer import utils as trl_utils


def sees_both_ways(model: PreTrainedModel) -> bool:
    """Whether the tokens of an image may see each other in both directions: told by the masks that the model's own code
    asks for. FlashAttention takes no such mask, and transformers 5.23 drops it without a word (masking_utils)."""
    source = inspect.getsource(sys.modules[type(model).__module__])
    return "block_sequence_ids" in source or "or_mask_function" in source


BOX_SCALES = {
    "Qwen2_5_VLProcessor": "pixels",
    "Qwen2VLProcessor": "0-1000",
    "Qwen3VLProcessor": "0-1000",
    "InternVLProcessor": "0-1000",
    "Glm4vProcessor": "0-1000",
    "Glm46VProcessor": "0-1000",
}
"""In what the families of these processors write boxes, of the image as the model sees it, after the resize, as their
authors say: QwenLM/Qwen3-VL's issues 676, 866 and 1486, OpenGVLab/InternVL's 285, zai-org's skill glmv-grounding.
Nothing in transformers 5.23 does, and no test can: where your model's report says otherwise, pass `to=`."""


def flash_attentions(model: PreTrainedModel) -> list[str]:
    """The FlashAttentions that may run on this GPU (Ampere or newer; the third on Hopper), best first: a build that is
    installed, or one that `kernels` fetches. transformers 5.23 asks no model whether it takes a kernel that is named,
    and for "flash_attention_3" fetches vLLM's build, made to serve. TRL 1.16 trains with the one named here."""
    if not model._supports_flash_attn or PartialState().device.type != "cuda":
        return []
    generation, _ = torch.cuda.get_device_capability()
    kernels, third = is_kernels_available(), is_flash_attn_3_available()
    found = {
        "flash_attention_3" if third else "kernels-community/flash-attn3": generation == 9 and (third or kernels),
        "flash_attention_2": generation >= 8 and (is_flash_attn_2_available() or kernels),
    }
    return [name for name, runs in found.items() if runs]


def is_sharded() -> bool:
    """Whether this process was launched with FSDP: by accelerate 1.15's own variable, which no function reads."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def is_bitsandbytes_optimizer(name: str) -> bool:
    """Whether an `--optim` is made by bitsandbytes: by transformers 5.23's own list, which no function reads."""
    return name in _BITSANDBYTES_OPTIMIZERS


def check_template_kwargs(processor: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for a keyword that neither `apply_chat_template` nor the chat template reads: transformers 5.23
    renders without it. Of a template that cannot be parsed, rendering says why."""
    try:
        read = _get_template_variables(processor._resolve_chat_template(kwargs.get("chat_template")))
    except (AttributeError, TemplateError, TypeError, ValueError):
        return
    if unread := sorted(kwargs.keys() - read - inspect.signature(processor.apply_chat_template).parameters.keys()):
        near = [f" (did you mean {each!r}?)" for name in unread for each in get_close_matches(name, read, n=1)]
        told = ", ".join(map(repr, unread)) + "".join(near[:1])
        found = f"chat_template_kwargs: the chat template does not read {told}"
        raise ValueError(f"{found}; it reads {', '.join(sorted(read))}: give one of these, or leave it out")


def use_one_gpu(args: TrainingArguments) -> bool:
    """Leaves the Trainer the first of several GPUs where no launcher started a process for each; whether it did. It
    would wrap the model in nn.DataParallel, which TRL 1.16 refuses; it sets this number itself for a model that it does
    not place. CUDA_VISIBLE_DEVICES comes too late: `import peft` imports bitsandbytes, which starts CUDA."""
    several = bool(args.n_gpu > 1)
    args._n_gpu = min(1, args.n_gpu)
    return several


def shard_on_cpu(args: TrainingArguments) -> None:
    """Makes a run that was launched with FSDP shard on CPUs too, where accelerate 1.15 would leave each process a whole
    copy of the model, without a word: it turns FSDP on only where it takes its processes for those of GPUs."""
    if args.use_cpu and is_sharded():
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        args.accelerator_config = {"use_configured_state": True}


def widen_once(model: PreTrainedModel) -> None:
    """Leaves the trainable weights of other processes than the main one empty, in float32, where FSDP gives them the
    main process's (`cpu_ram_efficient_loading`; accelerate 1.15 does not for 4-bit models). accelerate would widen them
    on the CPU in each process: 28 GB for 7 billion, eight times on eight GPUs. What is empty takes no memory until it
    is written to; frozen weights are mapped from the file, one copy for all processes."""
    is_packed = bool(getattr(model.config, "quantization_config", None))
    if is_fsdp_enabled() and not PartialState().is_main_process and not is_packed:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.empty_like(parameter, dtype=torch.float32)


def name_own_layers(model: PreTrainedModel) -> None:
    """Leaves in the model's `_no_split_modules`, by which accelerate 1.15 splits it for FSDP2, the layers that it has.
    It refuses others: the text layers of CLIP and SigLIP, which no vision-language model has (transformers 5.23)."""
    own = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = {name for name in model._no_split_modules or () if name in own}


def gather_head(model: PreTrainedModel) -> None:
    """Gathers an FSDP2 head as FSDP does it, before TRL 1.16 reads its weight past FSDP, by `full_tensor()`, whose
    backward takes the gradient of this process for that of all: each shard of an untied head would train on the rows of
    one process."""
    model.base_model.register_forward_hook(partial(_gather_head, model))


def _gather_head(model: Any, *_: Any) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule) and torch.is_grad_enabled():
        head.unshard()


_scores_some = trl_utils._use_triton  # type: ignore[attr-defined]


def score_labelled_positions(on: bool) -> None:
    """Makes TRL 1.16's fused head score only positions with a label on a CPU, as it does where Triton runs, or leaves
    it as it is. It would score every position, and each again backwards, as devices want it that compile for fixed
    shapes (`add_fused_lm_head`). Losses and gradients are equal up to rounding."""
    trl_utils._use_triton = lambda device: (on and device.type == "cpu") or _scores_some(device)  # type: ignore[attr-defined]


def leave_out_scales(model: nn.Module) -> None:
    """Keeps the scales of 4-bit weights out of the model's state, where bitsandbytes 0.50.2 lists them without being
    parameters: torch 2.13 saves them with a sharded model's adapters, and does not find their place when it loads."""
    for module in model.modules():
        if hasattr(module, "quant_state"):
            module.register_state_dict_post_hook(_drop_scales)  # type: ignore[no-untyped-call]


def _drop_scales(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}weight.")]:
        del state[key]


def fit_to_shards(model: PreTrainedModel) -> None:
    """All that FSDP2 needs of a model, so that a sharded run is the same run."""
    name_own_layers(model)
    if is_sharded():
        gather_head(model)
        leave_out_scales(model)


def keep_packing(model: nn.Module) -> None:
    """Leaves the 4-bit weights of a model on a CPU as they were loaded. Where it has AVX512-BF16, bitsandbytes 0.50.2
    packs them again at the first forward in eval mode, for a kernel that rounds to bfloat16 and passes no gradient:
    after an evaluation, training would fail or skip whole layers."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def number_images_by_row(model: Any) -> None:
    """Makes the positions of a row the same in every batch. HunYuan-VL numbers the images of a batch through
    (transformers 5.23, get_rope_index): it would train on other positions than it answers with."""
    if model.config.model_type == "hunyuan_vl":
        model.model.get_rope_index = MethodType(_index_by_row, model.model)


def _index_by_row(
    core: Any, input_ids: Any, mm_token_type_ids: Any, image_grid_thw: Any = None, attention_mask: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    found, taken = [], 0
    for row, types in enumerate(mm_token_type_ids):
        this = slice(row, row + 1)
        count = int((torch.diff(types == 1, prepend=types.new_zeros(1).bool()) & (types == 1)).sum())
        grid = None if image_grid_thw is None else image_grid_thw[taken : taken + count]
        mask = None if attention_mask is None else attention_mask[this]
        found.append(type(core).get_rope_index(core, input_ids[this], mm_token_type_ids[this], grid, mask))
        taken += count
    positions, deltas = zip(*found, strict=True)
    return torch.cat(positions, dim=1), torch.cat(deltas)


def save_with_own_names(model: PreTrainedModel, folder: str | os.PathLike[str], **options: Any) -> None:
    """`save_pretrained` with the names of the model's parameters for a checkpoint, and the Hub's for all else.

    By default transformers 5.23 writes the Hub's older names. Its Trainer, of which no argument reaches
    `save_original_format`, finds none of them when it resumes or loads the best model, and continues with what it has.
    """
    is_checkpoint = Path(folder).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
    type(model).save_pretrained(model, folder, save_original_format=not is_checkpoint, **options)


def limit_pixels(image_processor: Any, max_pixels: int) -> None:
    """Sets the number of pixels an image may have at most, which Qwen-VL's processors keep as `longest_edge` of a size
    whose two edges are numbers of pixels, while in other families they are edges (transformers 5.23).

    Raises ValueError for a processor that does not count pixels, and for what is not a number of them."""
    size = dict(image_processor.size or {})
    known = inspect.get_annotations(getattr(image_processor, "valid_kwargs", object))
    if "max_pixels" not in known or not {"shortest_edge", "longest_edge"} <= size.keys():
        found = f"max_pixels={max_pixels}: a {type(image_processor).__name__} does not resize by the number of pixels"
        raise ValueError(f"{found} (its size is {size}); leave max_pixels out for this family.")
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < 1:
        raise ValueError(f"max_pixels={max_pixels!r}: a number of pixels, such as 1003520 (1,280 tokens of 28 x 28).")
    least = min(size["shortest_edge"], max_pixels)
    image_processor.size = type(image_processor.size)(shortest_edge=least, longest_edge=max_pixels)


def seed_workers(loader: Any, seed: int) -> None:
    """Lets the loader draw what it gives its workers from a generator of its own. accelerate 1.15 keeps PyTorch's
    loader, from which it makes a resumed one, as `base_dataloader`, and passes on no attribute that is set on its own.
    """
    getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(seed)


def lacks_dora(module: Any) -> bool:
    """Whether PEFT 0.21.2 has no working DoRA for this layer: it has none for other quantizers' layers, and on a CPU it
    breaks 8-bit ones: it puts their weight back as a copy without the scales (dequantize_module_weight), which
    bitsandbytes 0.50.2 has moved to the layer, and the second forward fails."""
    if type(module).__name__ == "Linear8bitLt":
        return bool(module.weight.device.type == "cpu")
    return not isinstance(module, nn.Linear) and type(module).__name__ != "HQQLinear"


def targets_of(config: LoraConfig, model: nn.Module) -> set[str]:
    """The modules and parameters that PEFT would adapt by this config. PEFT 0.21.2 takes some mixtures (GLM-4.5V) for
    an older checkpoint whose experts were layers of their own: a pattern of full paths becomes a set of last names,
    which match in the tower too, and dense layers get no adapters."""
    config = copy.deepcopy(config)
    convert_peft_config_for_transformers(config, model, None)
    modules = {name for name, _ in model.named_modules() if check_target_module_exists(config, name)}
    stacked = [f".{name}" for name in config.target_parameters or ()]
    return modules | {name for name, _ in model.named_parameters() if f".{name}".endswith(tuple(stacked))}


def restore_adapter(model: PeftModel, file: Path) -> tuple[set[str], set[str]]:
    """Puts every tensor of an adapter's file into the model. Returns the names that it lacks, and those left over.
    PEFT 0.21.2, by which the Trainer loads checkpoints and the best one, renames a file's keys by the table with which
    transformers reads old checkpoints: for some families (DeepSeek-OCR-2) they then fit nothing, and the adapter stays
    as it was made, with a warning at most."""
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = load_file(file)
    with torch.no_grad():
        for name in saved.keys() & held.keys():
            held[name].copy_(saved[name])
    return held.keys() - saved.keys(), saved.keys() - held.keys()
