"""run.json and the model card tell what a run was: all but secrets and the machine's folders."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import runs
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from vlm_sft.chat.audit import audit
from vlm_sft.chat.collator import ChatCollator
from vlm_sft.models.loading import load_processor
from vlm_sft.tools import tiny
from vlm_sft.training.reports import write_reports


def report(base: Path, folder: Path, *, settings: dict | None = None, **options) -> tuple[dict, str]:
    """run.json of a trainer, as read back and as text."""
    trainer = runs.trainer(base, folder / "out", callbacks=[], **options)
    trainer.state.max_steps = 4
    (folder / "out").mkdir(exist_ok=True)
    write_reports(trainer, settings=settings or {}, results={"eval_loss": 1.5}, facts={})
    text = (folder / "out/run.json").read_text("utf-8")
    return json.loads(text), text


def test_run_json_tells_data_sizes_and_machine(tiny_dir, tiny_model, tmp_path):
    lora = LoraConfig(target_modules=r"model\.language_model.*\.[qv]_proj", r=4)
    found, _ = report(tiny_dir("llava15"), tmp_path, peft_config=lora, eval_dataset=runs.rows(3))
    model = tiny_model("llava15")
    adapters = sum(
        4 * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if re.fullmatch(r"model\.language_model.*\.[qv]_proj", name)
    )
    assert found["model"]["trainable_parameters"] == adapters
    assert found["model"]["parameters"] == model.num_parameters() + adapters
    assert {split: facts["rows"] for split, facts in found["data"].items()} == {"train": 8, "test": 3}
    assert found["results"] == {"eval_loss": 1.5}
    assert found["versions"]["torch"].startswith("2.")
    assert found["peak_memory_bytes"]["process"] > 50 << 20
    assert found["hardware"]["processes"] == 1
    assert 0 < found["process_runtime_s"] < 3600


def test_run_json_has_no_secret_and_no_folder_of_the_machine(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    token = "hf_" + "x" * 34
    recipe = {
        "model_name_or_path": "/home/somebody/models/llava",
        "dataset_name": str(tmp_path / "data" / "digits"),
        "api_key": "1234",
        "pad_token": "<pad>",
        "system_prompt": f"/no_think {token}",  # words, which evaluate.py asks with
        "notes": [f"sent {token} to https://example.org", "see /home/somebody/notes.txt"],
        "path": Path("/data/secret-project/photos"),
    }
    found, text = report(tiny_dir("llava15"), tmp_path, settings=recipe, hub_token=token)
    for secret in (token, "somebody", "1234", "secret-project", str(tmp_path)):
        assert secret not in text
    assert found["settings"]["recipe"] == {
        "model_name_or_path": ".../llava",
        "dataset_name": "data/digits",
        "api_key": "(hidden)",
        "pad_token": "<pad>",
        "system_prompt": "/no_think (hidden)",
        "notes": ["sent (hidden) to https://example.org", "see ~/notes.txt"],
        "path": ".../photos",
    }
    assert found["settings"]["training"]["hub_token"] == "(hidden)"


def test_run_json_names_the_commit_of_the_script(tiny_dir, tmp_path, monkeypatch):
    import __main__

    script = tmp_path / "repository" / "train.py"
    script.parent.mkdir()
    script.write_text("")
    monkeypatch.setattr(__main__, "__file__", str(script), raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    base = tiny_dir("llava15")
    assert report(base, tmp_path)[0]["git"] is None
    git = ["git", "-C", str(script.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    for verb in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *verb], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert report(base, tmp_path)[0]["git"] == commit
    script.write_text("print()")
    (script.parent / "outputs").write_text("not of the repository")
    assert report(base, tmp_path)[0]["git"] == f"{commit}-dirty"


def finished(folder: Path, base: Path, *, dataset_name: str, results: dict, **options) -> tuple[dict, ModelCard, str]:
    """run.json, the card and its text of a short run in `folder`, whose weights lie there too."""
    trainer = runs.trainer(base, folder, callbacks=[], eval_dataset=runs.rows(3), **options)
    trainer.train()
    trainer.save_model()
    checked = audit(ChatCollator(load_processor(base)), runs.rows(4), num_rows=2).facts()
    settings = {"dataset_name": dataset_name, "model_name_or_path": str(base)}
    facts = {"trains": "language   DoRA\nhead       -", "audit": checked}
    write_reports(trainer, settings=settings, results=results, facts=facts)
    card = ModelCard.load(folder / "README.md")
    return json.loads((folder / "run.json").read_text()), card, (folder / "README.md").read_text()


def follows_the_hubs_rules(card: ModelCard) -> None:
    """Fields that the Hub knows, ids where it wants ids, short texts in lists: its own check needs the network."""
    data = card.data.to_dict()
    assert data.keys() <= {"library_name", "model_name", "tags", "pipeline_tag", "base_model", "datasets", "license"}
    for name in ("base_model", "datasets"):
        for each in [data[name]] if isinstance(data.get(name), str) else data.get(name, []):
            validate_repo_id(each)
    assert all(isinstance(tag, str) and re.fullmatch(r"[\w:./-]{1,100}", tag) for tag in data["tags"])
    assert "license" not in data or re.fullmatch("[a-z0-9.-]+", data["license"])


def test_model_card_tells_data_method_and_results_and_its_lines_run(tiny_dir, tmp_path, monkeypatch):
    lora = LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=8, use_dora=True)
    results = {"eval_loss": 1.25, "eval_exact_match": 0.75, "eval_runtime": 3.5, "note": "text"}
    token = "hf_" + "x" * 34
    run, card, text = finished(
        tmp_path / "digits_sft",
        tiny_dir("llava15"),
        dataset_name="HuggingFaceM4/ChartQA",
        results=results,
        peft_config=lora,
        hub_token=token,
    )
    assert (tmp_path / "digits_sft" / "loss.png").is_file()
    assert run["proof"]["audit"]["answers"] == "2 end with '</s>'"
    assert run["results"].keys() == results.keys() | {
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
    }
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-text-to-text", "peft")
    assert card.data.datasets == "HuggingFaceM4/ChartQA"
    assert {"trl", "sft"} <= {*card.data.tags}
    follows_the_hubs_rules(card)
    lines = text.splitlines()
    for line in (
        "| train | 8 |",
        "| test | 3 |",
        "optimizer  adamw_torch_fused",
        "trains     language   DoRA",
        "           head       -",
        "| eval_loss | 1.25 |",
        "| eval_exact_match | 0.75 |",
        "- TRL: 1.16.0",
    ):
        assert line in lines
    for absent in (str(tmp_path), str(tiny_dir("llava15").parent), token, "None", "text-generation", "eval_runtime"):
        assert absent not in text

    monkeypatch.chdir(tmp_path)  # where the names of model and base are folders
    Path(tiny_dir("llava15").name).symlink_to(tiny_dir("llava15"))
    runs.rows(1)[0]["images"][0].save("photo.jpg")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("max_new_tokens=64", "max_new_tokens=4")
    exec(code, there := {})
    loaded, saved = get_peft_model_state_dict(there["model"]), load_file("digits_sft/adapter_model.safetensors")
    assert any("magnitude" in name for name in saved)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_model_card_of_a_full_model_and_local_data(tmp_path):
    base = tiny.save("llava15", tmp_path / "my_base")
    _, card, text = finished(
        tmp_path / "run", base, dataset_name=str(tmp_path / "secret" / "rows.jsonl"), results={"eval_loss": 1.0}
    )
    assert "Fine-tuned from `my_base` on `rows.jsonl` with" in text
    assert card.data.library_name == "transformers"
    assert card.data.datasets is None
    follows_the_hubs_rules(card)
    assert str(tmp_path) not in text
    assert 'from_pretrained("run", dtype="auto")' in text
