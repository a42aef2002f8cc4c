"""Evaluations show their images and answers in the trackers that the run reports to; nothing leaves the machine."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
from PIL import Image

from vlm_sft.chat.collator import ChatCollator
from vlm_sft.evaluation.callback import evaluate_answers, log_samples
from vlm_sft.evaluation.metrics import exact_match
from vlm_sft.evaluation.pages import Sample
from vlm_sft.models.loading import load_processor


def evaluated(base: Path, output_dir: Path, report_to: list[str], **options: Any) -> Any:
    """A four-step run that evaluates three of five rows before training and every two steps."""
    options |= {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "eval_dataset": runs.rows(4)}
    options["collator"] = ChatCollator(load_processor(base))
    trainer = runs.trainer(base, output_dir, callbacks=[], report_to=report_to, **options)
    metrics = {"accuracy": exact_match}
    evaluate_answers(trainer, runs.rows(5), metrics, num_rows=3, max_new_tokens=4)
    trainer.train()
    return trainer


def test_tensorboard_holds_numbers_images_and_answers(tiny_dir, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluated(tiny_dir("llava15"), tmp_path, ["tensorboard"])
    [folder] = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("eval/accuracy")] == [0, 2, 4]
    names = ["samples/0", "samples/1", "samples/2"]
    assert sorted(events.Tags()["images"]) == names
    assert [(event.step, event.width, event.height) for event in events.Images(names[0])] == [
        (step, 32, 32) for step in (0, 2, 4)
    ]
    [caption, *_] = events.Tensors("samples/1/text_summary")
    text = caption.tensor_proto.string_val[0].decode()
    # Rows 0, 1 and 3 of five.
    assert text.startswith("How many are there?\n\nprediction: ")
    assert text.endswith("reference: There are 1.")


def test_few_and_small_images_are_sent_and_only_to_trackers_that_are_on(monkeypatch):
    sent = []
    for package in ("trackio", "wandb"):
        fake = SimpleNamespace(Image=lambda picture, caption: (picture.size, caption), log=sent.append)
        monkeypatch.setitem(sys.modules, package, fake)
    samples = [Sample(images=[], question="q", reference="r", after="a", score=0.0)]
    samples += [
        Sample(images=[Image.new("L", (1000, 500))] * 2, question=f"q{n}", reference="r", after="a", score=0.0)
        for n in range(20)
    ]
    trainer = SimpleNamespace(
        args=SimpleNamespace(report_to=["wandb"]),
        state=SimpleNamespace(global_step=7),
        callback_handler=SimpleNamespace(callbacks=[]),
    )
    log_samples(trainer, samples)
    [logged] = sent
    assert logged.pop("train/global_step") == 7
    assert list(logged) == [f"samples/{n}" for n in range(8)]
    assert logged["samples/0"] == ((384, 192), "q0\n\nprediction: a\n\nreference: r")


def in_web_environment(test: Any) -> Any:
    missing = importlib.util.find_spec("trackio") is None
    test = pytest.mark.skipif(missing, reason="`make test-browser` runs it")(test)
    return pytest.mark.web(pytest.mark.loopback(test))


@in_web_environment
def test_trackio_holds_numbers_and_images_on_this_machine(tiny_dir, tmp_path):
    evaluated(tiny_dir("llava15"), tmp_path / "run", ["trackio"], project="digits")
    folder = Path(os.environ["HF_HOME"], "trackio")  # its default place
    pictures = [Image.open(file) for file in (folder / "media" / "digits").rglob("*.png")]
    assert [picture.size for picture in pictures] == [(32, 32)] * 9  # three at each of three evaluations
    held = b"".join(file.read_bytes() for file in folder.glob("digits.db*"))
    assert b"eval/accuracy" in held
    assert b"reference: There are 3." in held


@in_web_environment
def test_wandb_holds_the_images_in_its_offline_mode(tiny_dir, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    evaluated(tiny_dir("llava15"), tmp_path / "run", ["wandb"])
    wandb.finish()
    assert len([*(tmp_path / "wandb").rglob("media/images/samples/*.png")]) == 9
