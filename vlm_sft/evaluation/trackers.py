"""Answers with their pictures, in the trackers that a run reports to: TensorBoard, Trackio, Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers.integrations.integration_utils import TensorBoardCallback

from vlm_sft.chat.images import to_rgb
from vlm_sft.evaluation.pages import Sample

MAX_PICTURES = 8
"""An evaluation sends this many, each at most `PICTURE_PX` on its longer side, so that a tracker's files stay small."""
PICTURE_PX = 384


def log_samples(trainer: Any, samples: Sequence[Sample]) -> None:
    """Shows the first `MAX_PICTURES` samples that have a picture under `samples/0`, `samples/1`, ... at this step.

    What was asked, said and right is each picture's caption, in TensorBoard the text of the same name. Call it after
    `trainer.log`, which opens a tracker's run, on the main process; a tracker that is not in `report_to` is left alone.
    """
    shown = [sample for sample in samples if sample.images][:MAX_PICTURES]
    pictures = {f"samples/{number}": _small(sample.images[0]) for number, sample in enumerate(shown)}
    captions = [f"{sample.question}\n\nsaid: {sample.after}\n\nright: {sample.reference}" for sample in shown]
    captioned = list(zip(pictures.items(), captions, strict=True))
    step = trainer.state.global_step
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and (writer := callback.tb_writer) is not None:
            for (name, picture), caption in captioned:
                writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
                writer.add_text(name, caption, step)
    for package in {"trackio", "wandb"} & {*trainer.args.report_to}:
        tracker = importlib.import_module(package)
        images = {name: tracker.Image(picture, caption=caption) for (name, picture), caption in captioned}
        tracker.log(images | {"train/global_step": step})  # as transformers' callbacks of both count their steps


def _small(image: Any) -> Image.Image:
    picture = to_rgb(image).copy()
    picture.thumbnail((PICTURE_PX, PICTURE_PX))
    return picture
