"""Memory and speed of reading conversations by the number of rows: `python benchmarks/data.py [ROWS ...]`.

Each number of rows (1,000, 10,000 and 100,000 unless given) has a process of its own, offline: LLaVA JSON with pictures
of 640 x 480 and of other sizes (a tenth of that from 1,000,000 rows on, which would take hours) is written, loaded,
read in part with its pixels, checked (`check_rows`), and checked again from what is remembered.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PICTURES, READ = 400, 1000
WORDS = (
    "the cat",
    "sat on",
    "a mat",
    "and looked",
    "at people",
    "who were",
    "walking",
    "along",
    "the river",
    "with dogs",
)


def write_rows(folder: Path, count: int) -> Path:
    from PIL import Image

    draw = random.Random(0)
    for number in range(PICTURES):
        size = (640, 480) if number % 2 else (draw.randint(200, 1000), draw.randint(200, 1000))
        size = size if count < 1_000_000 else (size[0] // 10, size[1] // 10)
        noise = Image.effect_noise((size[0] // 8 + 1, size[1] // 8 + 1), 90).resize(size).convert("RGB")
        noise.save(folder / f"{number}.jpg", quality=85)
    with (folder / "rows.json").open("w") as file:
        for number in range(count):
            talk = []
            for turn in range(draw.choice([1, 1, 1, 2, 3])):
                question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(8, most))) for most in (16, 60))
                talk.append({"from": "human", "value": question if turn else f"<image>\n{question}"})
                talk.append({"from": "gpt", "value": f"{number} {answer}"})
            row = {"id": number, "image": f"{draw.randrange(PICTURES)}.jpg", "conversations": talk}
            file.write(("," if number else "[") + json.dumps(row))
        file.write("]")
    return folder / "rows.json"


def measure(count: int) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_HOME"] = f"{name}/home"
        path = write_rows(Path(name), count)
        import datasets
        import psutil
        from torch.utils.data import DataLoader

        from vlm_sft import ChatCollator, load_conversations
        from vlm_sft.chat.images import to_rgb
        from vlm_sft.data.check_rows import check_report
        from vlm_sft.tools import tiny

        datasets.disable_progress_bars()
        collator = ChatCollator(tiny.build("llava15")[1])
        process = psutil.Process()

        def memory() -> int:
            """MiB of its own: pages of files mapped into memory do not count, which the system takes back at need."""
            return (process.memory_info().rss - process.memory_info().shared) >> 20

        def processor_time() -> float:
            both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            return sum(used.ru_utime + used.ru_stime for used in both)

        before, start = memory(), time.perf_counter()
        rows = load_conversations(path, eval_fraction=0)["train"]
        loaded = time.perf_counter() - start
        drawn = rows.select(random.Random(1).sample(range(count), min(READ, count)))
        for batch in DataLoader(drawn, batch_size=8, collate_fn=list):
            for row in batch:
                [to_rgb(image) for image in row["images"]]
        read = memory()
        start, worked = time.perf_counter(), processor_time()
        report = check_report(rows, collator)
        seconds, worked = time.perf_counter() - start, processor_time() - worked
        ended, start = memory(), time.perf_counter()
        again = check_report(rows, collator)
        assert (again.known, again.bad_rows) == (count, report.bad_rows)
        remembered = time.perf_counter() - start
        print(
            f"{count:>9,}{path.stat().st_size >> 20:>6} MB{loaded:>8.1f} s{read - before:>11} MB",
            f"{max(ended, memory()) - before:>9} MB{seconds:>10.1f} s{worked:>10.1f} s{remembered:>8.1f} s",
            flush=True,
        )


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--measure"]:
        return measure(int(arguments[1]))
    print("     rows     JSON    loaded  memory, read  memory, end  checked in  CPU time     again")
    for count in arguments or ["1000", "10000", "100000"]:
        subprocess.run([sys.executable, __file__, "--measure", count], check=True, stderr=subprocess.DEVNULL)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
