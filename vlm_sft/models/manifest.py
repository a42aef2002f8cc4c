"""Which files a save is made of: `manifest.json`, its last file, with the size and hash of every other. A checkpoint
without one is a save that did not end; a file that differs is named, also where weights are loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
# What the Trainer loads from a checkpoint wherever it finds it (transformers 5.23).
_LOADED = ("optimizer.*", "scheduler.pt", "scaler.pt", "model*.safetensors*", "pytorch_model*", "adapter_model.*")


def verify_checkpoint(folder: str | Path) -> list[str]:
    """What is missing from a checkpoint or differs from its manifest; nothing if it is complete."""
    folder = Path(folder)
    try:
        content = read_manifest(folder)
        files = content["files"]
    except FileNotFoundError:
        return [f"it has no {MANIFEST}, so its save did not end"]
    except (ValueError, KeyError, TypeError):
        return [f"its {MANIFEST} is damaged"]
    there = {file.name for pattern in _LOADED if "resumable" in content for file in folder.glob(pattern)}
    faults = [f"{name} was added after its save" for name in sorted(there - files.keys())]
    for name, recorded in files.items():
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
        elif (size := (folder / name).stat().st_size) != recorded["size"]:
            faults.append(f"{name} has {size} bytes instead of {recorded['size']}")
    return faults or [f"{name} has changed" for name in files if _digest_of(folder / name) != files[name]["xxh3"]]


def write_manifest(folder: Path, content: Mapping[str, Any], *, files: str = "**/*") -> None:
    """Forces the files to the disk, then lists them in the manifest, which appears whole or not at all."""
    paths = sorted(path for path in folder.glob(files) if path.is_file() and path.name != MANIFEST)
    for path in (*paths, *{path.parent for path in paths}):
        _flush(path)
    found = {path: {"size": path.stat().st_size, "xxh3": _digest_of(path)} for path in paths}
    content = {**content, "files": {path.relative_to(folder).as_posix(): record for path, record in found.items()}}
    unfinished = folder / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps({**content, "xxh3": _own_digest(content)}, indent=1) + "\n", encoding="utf-8")
    _flush(unfinished)
    unfinished.replace(folder / MANIFEST)
    _flush(folder)
    _flush(folder.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a manifest. Raises ValueError where it is not as it was written."""
    content = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    if content.pop("xxh3", None) != _own_digest(content):
        raise ValueError("its content has changed")
    return content


def _own_digest(content: Mapping[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest_of(file: Path) -> str:
    """The xxh3 hash of a file: it tells damage, and costs little beside the save (`benchmarks/checkpoints.py`)."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()
