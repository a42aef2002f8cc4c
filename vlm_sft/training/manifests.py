"""A checkpoint folder is complete when its manifest, written last, agrees with every other file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def verify_checkpoint(folder: str | Path) -> list[str]:
    """What is missing from a checkpoint or differs from its manifest; nothing if it is complete."""
    folder = Path(folder)
    try:
        files = read_manifest(folder)["files"]
    except FileNotFoundError:
        return [f"it has no {MANIFEST}, so its save did not end"]
    except (ValueError, KeyError):
        return [f"its {MANIFEST} is damaged"]
    faults = []
    for name, recorded in files.items():
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
        elif (size := (folder / name).stat().st_size) != recorded["size"]:
            faults.append(f"{name} has {size} bytes instead of {recorded['size']}")
    if not faults:
        digests = _digests(folder / name for name in files)
        faults = [f"{n} has changed" for n, found in zip(files, digests, strict=True) if found != files[n]["sha256"]]
    return faults


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Forces every file to the disk, then lists them in the manifest, which appears whole or not at all."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in (*paths, *{path.parent for path in paths}):
        _flush(path)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }
    unfinished = folder / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps({**content, "files": files}, indent=1) + "\n", encoding="utf-8")
    _flush(unfinished)
    unfinished.replace(folder / MANIFEST)
    _flush(folder)
    _flush(folder.parent)


def _digests(paths: Iterable[Path]) -> list[str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(digest, paths))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
