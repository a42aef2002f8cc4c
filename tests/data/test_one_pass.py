"""Each row is read, decoded and encoded once, and what was found is remembered until the row or its reader changes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image, ImageFile
from runs import rows as image_rows
from together import together

from vlm_sft import ChatCollator, check_rows, load_conversations, pack
from vlm_sft.data import records
from vlm_sft.data.check_rows import check_report, rows_checked

pytestmark = pytest.mark.usefixtures("own_cache")
HELPER: list[str] = ["A"]


def test_an_image_is_told_by_name_and_size_and_where_and_when_apart(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "a.png").write_bytes(b"12345")
        os.utime(folder / "a.png", ns=(5, 5))
    first, elsewhere = (records._identity("a.png", folder) for folder in (here, there))
    assert (first[0], first[2]) == (elsewhere[0], elsewhere[2] == 5 and 5)
    assert first[1] != elsewhere[1]
    os.utime(here / "a.png", ns=(6, 6))
    later = records._identity("a.png", here)
    assert (later[0], later[2]) == (first[0], 6)
    assert later[1] != first[1]
    (here / "a.png").write_bytes(b"123456")
    os.utime(here / "a.png", ns=(6, 6))
    longer = records._identity("a.png", here)
    assert longer[0] != later[0]
    assert longer[1:] == later[1:]
    in_bytes = [records._identity({"bytes": data, "path": "a.png"}, here) for data in (b"a", b"b", b"a")]
    assert in_bytes[0] == in_bytes[2] != in_bytes[1]


def test_a_flipped_bit_in_what_is_remembered_is_never_believed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, random_ = tmp_path / "known.parquet", random.Random(0)
    made = [records.Record(n, 3, 2, records.note_of([f"fault {n}"] * (n % 3), [])) for n in range(50)]
    known = np.array([(bytes([n + 1] * 16), *record) for n, record in enumerate(made)], records.KEPT)
    records.write_cache(file, known)
    held = known.tolist()
    assert records.read_cache(file).tolist() == held
    content, unread = file.read_bytes(), 0
    for _ in range(300):
        damaged, at = bytearray(content), random_.randrange(len(content))
        damaged[at] ^= 1 << random_.randrange(8)
        file.write_bytes(damaged)
        found = records.read_cache(file)
        assert all(row in held for row in found.tolist()), at  # fewer rows are only checked again
        unread += not len(found)
    assert unread > 100
    assert "cannot be read" in capsys.readouterr().err


class Counted:
    """How many images were decoded and how many rows encoded since the last look."""

    decoded = encoded = 0

    def __call__(self) -> tuple[int, int]:
        found = (self.decoded, self.encoded)
        self.decoded = self.encoded = 0
        return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    count, encode = Counted(), ChatCollator.encode
    load = ImageFile.ImageFile.load

    def load_counted(self: Any, *args: Any) -> Any:
        count.decoded += getattr(self, "tile", []) != []
        return load(self, *args)

    def encode_counted(self: Any, examples: Any) -> Any:
        count.encoded += len(examples)
        return encode(self, examples)

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load_counted)
    monkeypatch.setattr(ChatCollator, "encode", encode_counted)
    return count


@pytest.fixture(scope="module")
def collator(tiny_processor: Callable[..., Any]) -> ChatCollator:
    return ChatCollator(tiny_processor("llava15"), max_length=400)


def line(number: int) -> dict[str, Any]:
    return {"q": f"What is {number}?", "a": f"It is {number}.", "image": f"{number}.jpg"}


def to_conversation(row: Any) -> dict[str, Any]:
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["q"]}]}
    return {"messages": [question, {"role": "assistant", "content": answer(row)}], "images": [row["image"]]}


def answer(row: Any) -> str:
    return HELPER[0] + row["a"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve rows, each with an image of its own."""
    (tmp_path / "data").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 24, 32, 3), dtype=np.uint8)
    for number in range(12):
        Image.fromarray(noise[number]).save(tmp_path / "data" / f"{number}.jpg")
    write(tmp_path / "data", 10)
    return tmp_path / "data"


def write(folder: Path, count: int) -> None:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(line(n)) for n in range(count)))


def start(folder: Path, collator: ChatCollator, **options: Any) -> Any:
    reading = {"to_conversation": to_conversation, "max_eval_rows": 2, "eval_fraction": 0.2, **options}
    return check_rows(load_conversations(folder / "rows.jsonl", **reading), collator, num_proc=0)


def test_a_second_start_decodes_nothing(
    folder: Path, collator: ChatCollator, counted: Counted, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(folder, collator)
    assert counted() == (10, 10)
    assert "8 rows checked in 0 s" in (told := capsys.readouterr().err)
    assert "0 of them known from before" in told
    again = start(folder, collator)
    assert [again[name]["length"][:] for name in again] == [first[name]["length"][:] for name in first]
    assert "8 of them known from before" in capsys.readouterr().err
    start(folder, collator, seed=1)
    assert counted() == (0, 0)
    assert rows_checked(again["train"]).cached == 8


def test_another_max_length_decodes_nothing(folder: Path, collator: ChatCollator, counted: Counted) -> None:
    lengths = start(folder, collator)["train"]["length"][:]
    counted()
    shorter = ChatCollator(collator.processor, max_length=max(lengths) - 1)
    with pytest.raises(ValueError, match="more than max_length") as raised:
        start(folder, shorter)
    assert counted()[0] == 0
    bad = lengths.index(max(lengths))
    row = load_conversations(folder / "rows.jsonl", to_conversation=to_conversation, eval_fraction=0.2)["train"][bad]
    with pytest.raises(ValueError, match="more than max_length") as own:
        shorter([row])
    assert str(own.value).split(": ", 1)[1] in str(raised.value)


def test_rows_appended_are_the_only_ones_decoded(folder: Path, collator: ChatCollator, counted: Counted) -> None:
    start(folder, collator)
    counted()
    write(folder, 12)
    start(folder, collator)
    assert counted() == (2, 2)


def test_what_changes_is_decoded_again(
    folder: Path, collator: ChatCollator, counted: Counted, monkeypatch: pytest.MonkeyPatch, tiny_processor: Any
) -> None:
    start(folder, collator)
    assert counted() == (10, 10)
    os.utime(folder / "3.jpg", ns=(0, time.time_ns()))
    Image.new("RGB", (20, 20)).save(folder / "4.jpg")
    start(folder, collator)
    assert counted() == (2, 2)
    monkeypatch.setitem(globals(), "HELPER", ["Well, "])  # a helper of to_conversation
    start(folder, collator)
    assert counted() == (10, 10)
    other = tiny_processor("llava15")
    other.chat_template = "{{- '' }}" + other.chat_template
    start(folder, ChatCollator(other, max_length=400))
    assert counted()[1] >= 10
    start(folder, ChatCollator(collator.processor, max_length=400, train_on="all"))
    assert counted()[1] >= 10
    versions = records._made_with()
    assert set(versions) == {"code", "transformers", "tokenizers", "pillow", "torchvision"}
    monkeypatch.setattr(records, "_made_with", lambda: versions | {"pillow": "0"})
    start(folder, collator)
    assert counted() == (10, 10)
    monkeypatch.setattr(records, "_made_with", lambda: versions | {"code": "edited"})
    start(folder, collator)
    assert counted() == (10, 10)


def test_faults_are_remembered_and_go_with_their_cause(folder: Path, collator: ChatCollator, counted: Counted) -> None:
    whole = (folder / "5.jpg").read_bytes()
    (folder / "5.jpg").write_bytes(whole[:-100])
    for expected in (10, 0):
        with pytest.raises(ValueError, match=r"(?s)1  row 5\n.*image '5.jpg' is damaged"):
            start(folder, collator)
        assert counted()[0] == expected
    (folder / "5.jpg").write_bytes(whole)
    start(folder, collator)
    assert counted() == (1, 1)


def test_a_failing_disk_is_not_remembered(
    folder: Path, collator: ChatCollator, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(5, "Input/output error")

    data = load_conversations(folder / "rows.jsonl", to_conversation=to_conversation, eval_fraction=0)
    with monkeypatch.context() as patched:
        patched.setattr("PIL.Image.open", refuse)
        with pytest.raises(ValueError, match="10 bad"):
            check_rows(data, collator, num_proc=0)
    start(folder, collator)
    assert counted() == (10, 10)


def test_rows_that_are_trimmed_are_encoded_again_and_once(
    folder: Path, collator: ChatCollator, counted: Counted
) -> None:
    lengths = start(folder, collator)["train"]["length"][:]
    counted()
    long = [{**line(n), "a": "It is. " * (50 if n == 3 else 1)} for n in range(10)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, long)))
    trimming = ChatCollator(collator.processor, max_length=max(lengths) + 20, truncation="trim")
    rows = start(folder, trimming)
    assert counted() == (10, 11)
    assert max(max(rows[name]["length"][:]) for name in rows) == max(lengths) + 20
    start(folder, trimming)
    assert counted() == (0, 0)
    refusing = ChatCollator(collator.processor, max_length=max(lengths) + 20)
    with pytest.raises(ValueError, match=r"row 3\n.*raise it, set truncation='trim', or drop the row"):
        start(folder, refusing)
    assert counted() == (0, 0)


def test_images_made_by_to_conversation_are_told_by_their_pixels(folder: Path, collator: ChatCollator) -> None:
    def drawn(shade: int) -> Any:
        def to_conversation(row: Any) -> dict[str, Any]:
            image = Image.new("RGB", (16, 16), (shade, 0, int(Path(row["image"]).stem)))
            part = {"type": "image", "image": image}
            talk = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
            return {"messages": [*talk, {"role": "assistant", "content": "A square."}]}

        return to_conversation

    cached = [rows_checked(start(folder, collator, to_conversation=drawn(n))["train"]).cached for n in (1, 1, 2)]
    assert cached == [0, 8, 0]


def test_a_cache_that_cannot_be_kept_or_read_is_told(
    folder: Path, collator: ChatCollator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(folder, collator)
    [file] = Path(datasets.config.HF_DATASETS_CACHE, "vlm_sft").iterdir()
    file.write_bytes(b"PAR1")
    capsys.readouterr()
    start(folder, collator)
    told = capsys.readouterr().err
    assert "cannot be read" in told
    assert "0 of them known from before" in told
    data = load_conversations(folder / "rows.jsonl", to_conversation=to_conversation, eval_fraction=0)["train"]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "0.jpg")  # a file, so no folder to write in
    assert len(check_rows(data, collator)) == 10
    assert "cannot be kept" in capsys.readouterr().err


@pytest.fixture
def asked(workers_asked: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many workers each pass took."""
    monkeypatch.setattr("vlm_sft.data.check_rows.core_count", lambda: 4)
    return workers_asked


def talks(numbers: range) -> list[dict[str, Any]]:
    answer = {"role": "assistant", "content": "So."}
    return [{"messages": [{"role": "user", "content": f"Why {n}?"}, answer], "images": []} for n in numbers]


@pytest.mark.parametrize(
    ("rows", "cores", "method", "workers"),
    [(255, 4, "fork", 0), (256, 4, "fork", 2), (600, 4, "fork", 4), (600, 1, "fork", 0), (600, 4, "spawn", 0)],
)
def test_a_pass_takes_workers_where_they_are_worth_their_start(
    rows: int, cores: int, method: str, workers: int, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_sft.data.check_rows.core_count", lambda: cores)
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: method)
    assert check_report(talks(range(rows))).rows == rows
    assert asked == [workers]


def test_known_rows_are_looked_up_without_workers(asked: list[int]) -> None:
    for numbers, known in ((range(300), 0), (range(300), 300), (range(300, 600), 0), (range(400, 1000), 200)):
        assert check_report(talks(numbers)).known == known
    assert asked == [2, 0, 2, 4]


@pytest.mark.parametrize("num_proc", [0, 2])
def test_the_random_state_stays(folder: Path, collator: ChatCollator, num_proc: int) -> None:
    rows = load_conversations(folder / "rows.jsonl", to_conversation=draws, eval_fraction=0)["train"]
    state = random.getstate(), torch.get_rng_state().tolist()
    report = check_report(rows, collator, num_proc=num_proc)
    assert (random.getstate(), torch.get_rng_state().tolist()) == state
    assert len(report.keep) == 10


def draws(row: Any) -> dict[str, Any]:
    random.random()
    torch.rand(1)
    return to_conversation(row)


def test_columns_come_with_every_split_and_through_the_transform(folder: Path, collator: ChatCollator) -> None:
    plain = image_rows(8)
    read = plain.with_transform(lambda batch: {**batch, "read": batch["row"]})
    own = start(folder, collator)["train"]
    data = check_rows(DatasetDict({"train": read, "test": plain}), collator, num_proc=0)
    for rows in (*data.values(), own):
        encoded = [collator.encode([row])[0][0] for row in rows]
        assert rows["length"][:] == [len(row) for row in encoded]
        assert rows["image_tokens"][:] == [int(row.image.sum()) for row in encoded]
        assert rows["trained_tokens"][:] == [int((row.labels != -100).sum()) for row in encoded]
    assert data["train"][2]["read"] == 102
    assert own[1].keys() == {"messages", "images", "row", "length", "image_tokens", "trained_tokens"}
    assert check_rows(data, collator, num_proc=0)["train"].column_names == data["train"].column_names


@pytest.mark.parametrize("first", [0, 2])
def test_rows_that_were_selected_are_not_written_anew(
    first: int, collator: ChatCollator, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = image_rows(8).select(range(first, 8)).select([4, 1, 3, 1])
    monkeypatch.setattr(Dataset, "flatten_indices", lambda *_: pytest.fail("all rows would be written"))
    rows = check_rows(chosen, collator, num_proc=0)
    assert rows["length"][:] == [len(row) for row in collator.encode(list(chosen))[0]]
    assert rows["row"][:] == chosen["row"][:]


def test_a_dataset_knows_whether_it_was_checked(folder: Path, collator: ChatCollator) -> None:
    data = load_conversations(folder / "rows.jsonl", to_conversation=to_conversation, eval_fraction=0)["train"]
    assert rows_checked(data) is None
    ignored = check_rows(data, collator, on_bad_rows="ignore")
    assert ignored.column_names == data.column_names
    assert (rows_checked(ignored).on_bad_rows, rows_checked(ignored).bad) == ("ignore", None)
    checked = check_rows(data, collator, num_proc=0)
    found = rows_checked(checked)
    assert (found.on_bad_rows, found.max_length, found.bad, found.cached) == ("error", 400, 0, 0)
    assert found.collator == collator.fingerprint() != ChatCollator(collator.processor, train_on="all").fingerprint()
    assert rows_checked(checked.select([0])) is None
    assert rows_checked(checked.with_transform(lambda batch: batch)) is None
    assert rows_checked(pack(checked, max_length=200)) == found


def share(folder: str, cache: str, base: str) -> Any:
    from transformers import AutoProcessor

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    from accelerate import PartialState

    PartialState(cpu=True)
    looked = []
    record = records.Look.record
    records.Look.record = lambda self, *made: looked.append(1) or record(self, *made)  # type: ignore[method-assign]
    collator = ChatCollator(AutoProcessor.from_pretrained(base))
    rows = load_conversations(f"{folder}/rows.jsonl", to_conversation=to_conversation, eval_fraction=0)["train"]
    counts = []
    for _ in range(2):
        lengths = check_rows(rows, collator, num_proc=0)["length"][:]
        counts.append(len(looked))
        torch.distributed.barrier()
    return lengths, counts


@pytest.mark.loopback
def test_processes_share_the_rows(folder: Path, tmp_path: Path, tiny_dir: Callable[[str], Path]) -> None:
    found = together(share, str(folder), str(tmp_path / "shared"), str(tiny_dir("llava15")))
    assert found[0][0] == found[1][0]
    assert [counts for _, counts in found] == [[5, 5], [5, 5]]


def other_rows(folders: list[str], cache: str, base: str) -> str:
    from transformers import AutoProcessor

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    collator = ChatCollator(AutoProcessor.from_pretrained(base))
    data = load_conversations(f"{folders[rank]}/rows.jsonl", to_conversation=to_conversation, max_eval_rows=2)
    try:
        return str(len(check_rows(data, collator, num_proc=0)["train"]))
    except ValueError as error:
        return str(error)


@pytest.mark.loopback
@pytest.mark.parametrize("what", ["same rows elsewhere", "one row less", "another answer"])
def test_each_process_has_the_rows_of_the_main_one(
    what: str, folder: Path, tmp_path: Path, tiny_dir: Callable[[str], Path]
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    lines = (other / "rows.jsonl").read_text().splitlines()
    (other / "rows.jsonl").write_text("\n".join({"one row less": lines[1:]}.get(what, lines)))
    if what == "another answer":
        (other / "rows.jsonl").write_text("\n".join(lines).replace("It is 7.", "It is 8."))
    found = together(other_rows, [str(folder), str(other)], str(tmp_path / "cache"), str(tiny_dir("llava15")))
    if what == "same rows elsewhere":
        assert found == ["8", "8"]
    else:
        count = {
            "one row less": r"\(it has [72], the main one [82]\)",
            "another answer": r"\(it has ([28]), the main one \1\)",
        }[what]
        for told in found:  # no process goes on, or waits
            assert re.search(
                rf"process 1 reads other rows of '(?:test|train)' than the main one {count}; give every", told
            )


def test_records_are_found_again_and_take_little_room(tmp_path: Path) -> None:
    """Also those whose key ends with zeros, which NumPy takes for padding."""
    count, file = 7_000, tmp_path / "known.parquet"
    keys = [random.Random(n).randbytes(16) if n % 7 else random.Random(n).randbytes(15) + b"\0" for n in range(count)]
    notes = [records.note_of(["bad"] * (n % 100 == 0), ["turned"] * (n % 50 == 0)) for n in range(count)]
    made = [records.Record(n, n % 9, n % 5, note) for n, note in enumerate(notes)]
    kept = np.array([(key, *record) for key, record in zip(keys, made, strict=True)], records.KEPT)
    assert kept.nbytes < 60 * count
    for _ in range(2):
        records.write_cache(file, kept)
    known = records.read_cache(file)
    assert len(known) == count
    for n in range(0, count, 7):
        assert records.recall(known, keys[n]) == made[n]
    assert records.recall(known, b"x" * 16) is None
