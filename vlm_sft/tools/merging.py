"""An adapter merged into its base: a standalone model, kept only if it answers as adapter on base does.

`python -m vlm_sft merge ADAPTER OUT` reads the `training_base.json` that `SafeCheckpoints` writes next to the adapter.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor

from vlm_sft.models.fingerprints import TRAINING_BASE, loaded_from, place_of_base, read_training_base
from vlm_sft.models.hardware import dtype_name
from vlm_sft.models.loading import ADAPTER_WEIGHTS, load_model, load_processor, read_adapter_config

Base = Literal["as-trained", "original"]

_GREEDY = {"do_sample": False, "num_beams": 1, "output_logits": True, "return_dict_in_generate": True}
# A 16-bit model rounds weights and activations to 8 or 11 bits; LLM.int8 activations to 8 bits of their row's maximum.
_TOLERANCES, _TOLERANCE_8BIT = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.02}, 0.05


@dataclass(frozen=True)
class Merged:
    """The folder that was written, and what proved it."""

    folder: Path
    dtype: str
    error: float  # distance of its logits from those of adapter on base, relative to their norm
    effect: float  # that of the base without adapter
    same_tokens: tuple[int, int]  # greedy ones that agreed, of all; they part only where two were as good as equal

    def __str__(self) -> str:
        differ = f"logits differ from adapter on base by {self.error:.1e} (relative; the adapter's effect is"
        agreed, total = self.same_tokens
        return f"{self.folder} ({self.dtype}): {differ} {self.effect:.1e}), {agreed} of {total} tokens agree"


class _Answers(NamedTuple):
    """To a question with an image and one without: logits of the prompt, greedy tokens, logits of each of these."""

    prompt: list[Tensor]
    tokens: list[Tensor]
    steps: list[Tensor]


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: Base = "as-trained",
    base_model: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Writes `out`: merged weights, processor and generation config, all of it proven, or nothing.

    - `base`: `"as-trained"` merges into the weights that training saw; those of a 4-bit or 8-bit base are dequantized
      and kept in 16 bit, since the adapter learnt to correct their errors. `"original"`: the weights before that.
    - `base_model`: where the base is now, if not where training found it. Its weights must be the same.
    - `dtype`: of the result, by its name too; that of the base by default.

    Raises `ValueError` where `out` exists, the base is missing or another one, a key is missing or left over, the
    adapter has no effect, or the result, read again, differs from adapter on base: by its logits (relative error above
    1e-4 in float32, 0.02 in 16 bit, 0.05 for an 8-bit base), by being nearer to the bare base, or by what it generates.
    """
    adapter, out = Path(adapter), Path(out)
    recorded = _check(adapter, out, base)
    quantization = recorded.get("quantization_config") if base == "as-trained" else None
    device_map = "auto" if torch.accelerator.is_available() else None
    load = partial(load_model, device_map=device_map, trust_remote_code=trust_remote_code)

    model = load(adapter, base_model=base_model, quantization_config="auto" if quantization else None).eval()
    own = (adapter / "processor_config.json").is_file()
    source, revision = (adapter, None) if own else loaded_from(model.get_base_model())
    processor = load_processor(source, revision=revision, trust_remote_code=trust_remote_code and not own)
    expected = _answers(model, processor)
    with model.disable_adapter():
        bare = _answers(model, processor, new_tokens=0)
    if not _distance(expected.prompt, bare.prompt):
        raise ValueError(f"the adapter in {adapter} has no effect: the base gives the same logits without it; train it")
    reference_dtype = model.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or reference_dtype
    eight_bit = _TOLERANCE_8BIT if quantization and quantization.get("load_in_8bit") else 0.0
    tolerance = max(_TOLERANCES[dtype], _TOLERANCES[reference_dtype], eight_bit)
    if quantization:
        model = PeftModel.from_pretrained(model.unload().dequantize(dtype=reference_dtype), adapter).eval()
    if dtype == torch.float32:
        model.float()  # before the sum, which rounds in the dtype of the weights
    model = model.merge_and_unload(progressbar=True, safe_merge=True).to(dtype)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch, out.name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        del model  # never two of them in memory
        processor = load_processor(folder, trust_remote_code=trust_remote_code)
        found = _answers(load(folder, dtype=dtype).eval(), processor)
        error, effect = _compare(expected, found, bare, tolerance)
        same = sum(int((a[: len(b)] == b[: len(a)]).sum()) for a, b in zip(expected.tokens, found.tokens, strict=True))
        merged = Merged(out, dtype_name(dtype), error, effect, (same, sum(map(len, expected.tokens))))
        name = recorded.get("base_model_name_or_path", "")
        known = "" if Path(name).is_absolute() or Path(name).exists() else f"base_model: {name}\n"  # no local folder
        into = "its dequantized base, as it was in training" if quantization else "its base"
        card = f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n{known}---\n\n"
        card += f"An adapter merged into {into}, in {merged.dtype}. "
        card += f"Logits differ from adapter on base by {error:.1e} (relative).\n"
        (folder / "README.md").write_text(card, encoding="utf-8")
        os.rename(folder, out)
    return merged


def _check(adapter: Path, out: Path, base: str) -> dict[str, Any]:
    """What is known of the adapter's base. Raises for all that stands in the way before anything is loaded."""
    absent = [name for name in ("adapter_config.json", ADAPTER_WEIGHTS) if not (adapter / name).is_file()]
    faults = [f"{adapter} holds no {name}; give the folder that training saved the adapter in" for name in absent]
    recorded = read_training_base(adapter)
    if base not in get_args(Base):
        faults.append(f"base={base!r}; expected one of {', '.join(get_args(Base))}")
    elif recorded is None and base == "as-trained" and not faults:
        unsaid = f"{adapter} does not say how its base was loaded in training (it has no {TRAINING_BASE})"
        faults.append(f"{unsaid}; use base='original' to merge into the weights as they are published")
    if out.exists():
        faults.append(f"{out} exists already; choose another folder, or remove it")
    if faults:
        raise ValueError("; ".join(faults))
    named = place_of_base(adapter, read_adapter_config(adapter).base_model_name_or_path)
    return (recorded or {}) | ({"base_model_name_or_path": named} if named else {})


@torch.no_grad()
def _answers(model: Any, processor: Any, *, new_tokens: int = 16) -> _Answers:
    asked, answers = [{"type": "image"}, {"type": "text", "text": "What is this?"}], _Answers([], [], [])
    image = Image.linear_gradient("L").resize((96, 72)).convert("RGB")
    for content, images in ((asked, [image]), (asked[1:], None)):
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=images, return_tensors="pt").to(model.device, model.dtype)
        answers.prompt.append(model(**inputs, use_cache=False).logits[0].float().cpu())
        if new_tokens:
            generated = model.generate(**inputs, **_GREEDY, max_new_tokens=new_tokens)
            answers.steps.append(torch.cat(generated.logits).float().cpu())
            answers.tokens.append(generated.sequences[0, -len(generated.logits) :].cpu())
    return answers


def _compare(expected: _Answers, found: _Answers, bare: _Answers, tolerance: float) -> tuple[float, float]:
    """Relative error and effect. Raises where the error is above the tolerance, or the adapter's effect is lost."""
    if [len(p) for p in expected.prompt] != [len(p) for p in found.prompt]:
        raise ValueError("the merged model's processor does not read the question as the adapter's does")
    error, effect = _distance(expected.prompt, found.prompt), _distance(expected.prompt, bare.prompt)
    if not error <= tolerance:
        raise ValueError(f"the merged model's logits are off by {error:.2g} (relative), more than {tolerance:.2g}")
    if _distance(found.prompt, bare.prompt) < _distance(found.prompt, expected.prompt):
        near = f"the merged model is nearer to the bare base than to adapter on base, {effect:.2g} away from it"
        raise ValueError(f"{near} (relative): rounding has erased it; merge with dtype=torch.float32")
    for question, (tokens, others) in enumerate(zip(expected.tokens, found.tokens, strict=True)):
        common = min(len(tokens), len(others))
        parted = (tokens[:common] != others[:common]).nonzero().flatten().tolist()
        shared = parted[0] + 1 if parted else common  # what was read up to there is the same
        off = _distance([expected.steps[question][:shared]], [found.steps[question][:shared]])
        if not off <= tolerance or (not parted and len(tokens) != len(others)):
            raise ValueError(f"the merged model generates {others.tolist()}, adapter on base {tokens.tolist()}")
    return error, effect


def _distance(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Norm of the difference, relative to that of the reference."""
    difference = torch.cat([(a - b).flatten() for a, b in zip(reference, other, strict=True)])
    return float(difference.norm() / torch.cat([a.flatten() for a in reference]).norm())
