"""The generation settings a model was loaded with, kept through training and in every checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class KeepGeneration(TrainerCallback):
    """Keeps `use_cache` and the generation config as loaded, in every checkpoint and in the model after training.

    Make it before the Trainer, which writes `use_cache=False` into the config and changes special tokens
    (transformers 5.23). End tokens that the Trainer adds stay, and so does a pad or start token where none was set:
    generation stops at the token that training taught. SFTTrainer passes `use_cache=False` to each training forward
    by itself.

    Raises ValueError at the start of training for a generation config that could not be saved at its end.
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.loaded = copy.deepcopy(self.model.generation_config)
        self.use_cache = getattr(self.model.config, "use_cache", None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restore()
        try:
            with TemporaryDirectory() as folder:
                self.model.generation_config.save_pretrained(folder)
        except ValueError as error:
            raise ValueError(
                f"This generation config could not be saved after training: {error} Change model.generation_config "
                "first, for instance do_sample=True where a temperature is set."
            ) from error

    def _restore(self) -> None:
        restored: Any = copy.deepcopy(self.loaded)
        changed = self.model.generation_config
        ends = _as_list(restored.eos_token_id)
        if added := [token for token in _as_list(changed.eos_token_id) if token not in ends]:
            restored.eos_token_id = [*ends, *added]
        for token in ("bos_token_id", "pad_token_id"):
            if getattr(restored, token) is None:
                setattr(restored, token, getattr(changed, token))
        self.model.generation_config = restored
        if self.use_cache is not None:
            self.model.config.use_cache = self.use_cache
        elif hasattr(self.model.config, "use_cache"):
            del self.model.config.use_cache


def _as_list(ids: int | Sequence[int] | None) -> Sequence[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else ids
