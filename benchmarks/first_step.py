"""Seconds from the rows to the first step: `python benchmarks/first_step.py [ROWS]`.

5,000 rows unless given, each with a JPEG of 512 x 512 of its own, are loaded, checked (`check_rows`) and audited with
the twin of LLaVA-1.5: at the first start, at a second one, and at a second one with another seed, each in a process of
its own, offline.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDE = 512
STARTS = (("first start", "0"), ("second start", "0"), ("another seed", "1"))


def write_rows(folder: Path, count: int) -> Path:
    from PIL import Image

    draw = random.Random(0)
    lines = []
    for number in range(count):
        noise = Image.effect_noise((SIDE // 8, SIDE // 8), 90).resize((SIDE, SIDE)).convert("RGB")
        noise.save(folder / f"{number}.jpg", quality=85)
        talk = []
        for turn in range(draw.choice([1, 1, 2, 3])):
            question, answer = (" ".join(draw.choices(["the", "cat", "sat", "on", "mats"], k=k)) for k in (12, 30))
            talk.append({"from": "human", "value": question if turn else f"<image>\n{question}"})
            talk.append({"from": "gpt", "value": f"{number} {answer}"})
        lines.append(json.dumps({"image": f"{number}.jpg", "conversations": talk}))
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "rows.jsonl"


def start(path: str, seed: int) -> None:
    """One start; prints the seconds of each part."""
    import datasets

    from vlm_sft import ChatCollator, check_rows, load_conversations
    from vlm_sft.chat.audit import audit
    from vlm_sft.tools import tiny

    datasets.disable_progress_bars()
    collator = ChatCollator(tiny.build("llava15")[1], max_length=2048)
    times = [time.perf_counter()]
    data = load_conversations(path, seed=seed)
    times.append(time.perf_counter())
    data = check_rows(data, collator)
    times.append(time.perf_counter())
    audit(collator, data["train"])
    times.append(time.perf_counter())
    print(*(f"{after - before:>10.2f} s" for before, after in itertools.pairwise(times)), flush=True)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--start"]:
        return start(arguments[1], int(arguments[2]))
    with tempfile.TemporaryDirectory() as name:
        path = write_rows(Path(name), int((arguments or ["5000"])[0]))
        environment = {"HF_HOME": f"{name}/home", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        print(f"{'':14}{'load':>12} {'check_rows':>12} {'audit':>12}", flush=True)
        for title, seed in STARTS:
            print(f"{title:14}", end="", flush=True)
            command = [sys.executable, __file__, "--start", str(path), seed]
            subprocess.run(command, check=True, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
