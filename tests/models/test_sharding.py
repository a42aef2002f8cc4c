"""What FSDP2 asks of a model; the runs themselves are in test_distributed.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vlm_sft.models.sharding import is_sharded

from vlm_sft.models.loading import load_model
from vlm_sft.models.quantization import nf4_config
from vlm_sft.tools import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_names_the_layers_it_has(family: str, tiny_dir: Any) -> None:
    model = load_model(tiny_dir(family))
    kinds = [type(module).__name__ for module in model.modules()]
    assert all(name in kinds for name in model._no_split_modules)
    assert any(kinds.count(name) >= 2 and "Decoder" in name for name in model._no_split_modules)


@pytest.mark.parametrize(("launched", "storage"), [("", torch.uint8), ("true", torch.bfloat16)])
def test_packed_weights_are_stored_as_the_launch_needs_them(
    launched: str, storage: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", launched)
    assert is_sharded() == bool(launched)
    assert nf4_config("llava", compute_dtype=torch.bfloat16).bnb_4bit_quant_storage == storage
    asked = nf4_config("llava", compute_dtype=torch.bfloat16, storage_dtype=torch.float16)
    assert asked.bnb_4bit_quant_storage == torch.float16
