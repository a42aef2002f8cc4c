"""Every layout of data comes out as the same conversations; wrong columns, paths and folders are named."""

from __future__ import annotations

import io
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, List, Value, interleave_datasets
from PIL import Image
from torch.utils.data import DataLoader

from vlm_sft.chat.images import to_rgb
from vlm_sft.chat.messages import normalise, text_of
from vlm_sft.data.datasets import load_conversations
from vlm_sft.data.files import read_rows
from vlm_sft.data.rows import drawn_seed

pytestmark = pytest.mark.usefixtures("own_cache")

VSFT = Features(
    {
        "messages": [
            {
                "role": Value("string"),
                "content": [{"index": Value("int64"), "text": Value("string"), "type": Value("string")}],
            }
        ],
        "images": List(datasets.Image()),
    }
)
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (12 + number, 8), COLOURS[number % 4])


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 0.png to 3.png in `pictures/`."""
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for number in range(4):
        (tmp_path / "data" / "pictures" / f"{number}.png").write_bytes(png(number))
    return tmp_path / "data"


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words(row: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(role, text, images) of each message of a row."""
    messages = normalise(row["messages"], row["images"]).messages
    return [
        (message["role"], text_of(message), sum(part["type"] == "image" for part in message["content"]))
        for message in messages
    ]


def vsft_rows(count: int) -> list[dict[str, Any]]:
    def part(kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "text": None, "index": None} | fields

    return [
        {
            "messages": [
                {"role": "user", "content": [part("text", text=f"Which colour, {n}?"), part("image", index=0)]},
                {"role": "assistant", "content": [part("text", text=f"colour {n % 4}")]},
            ],
            "images": [picture(n)],
        }
        for n in range(count)
    ]


def chat(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"<image>\nQ{number}"},
        {"role": "assistant", "content": f"A{number}"},
    ]


def test_the_hub_schema_is_read_and_its_images_are_left_as_they_are(tmp_path: Path) -> None:
    saved = DatasetDict(
        {
            "train": Dataset.from_list(vsft_rows(6), features=VSFT),
            "test": Dataset.from_list(vsft_rows(2), features=VSFT),
        }
    )
    saved.save_to_disk(tmp_path / "vsft")
    loaded = load_conversations(tmp_path / "vsft")
    assert {name: (rows.num_rows, rows.column_names) for name, rows in loaded.items()} == {
        "train": (6, ["messages", "images", "row", "_reader"]),
        "test": (2, ["messages", "images", "row", "_reader"]),
    }
    assert loaded["train"].features["messages"] == VSFT["messages"]
    for n, (row, before) in enumerate(zip(loaded["train"], saved["train"], strict=True)):
        assert row["row"] == n
        assert row["messages"] == normalise(before["messages"], before["images"]).messages
        assert [image.tobytes() for image in row["images"]] == [image.tobytes() for image in before["images"]]
    # The pixels of the source are not written again.
    files = {Path(file["filename"]).parent for file in loaded["train"].cache_files}
    assert files == {tmp_path / "vsft" / "train"}


def test_pictures_are_not_decoded_before_they_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder / "a.jsonl", [{"messages": chat(n), "images": [f"pictures/{n}.png"]} for n in range(4)])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    rows = load_conversations(path, eval_fraction=0)["train"]
    assert [image.size for row in rows for image in row["images"]] == [(12, 8), (13, 8), (14, 8), (15, 8)]


LLAVA = [
    {
        "id": "1",
        "image": "pictures/0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "Red."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes, <image> is a word here."},
        ],
    },
    {
        "id": "2",
        "image": ["pictures/1.png", "pictures/2.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Compare <image> and\n<image>"},
            {"from": "gpt", "value": "Green, blue."},
        ],
    },
    {"id": "3", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_llava_json(folder: Path, suffix: str, streaming: bool) -> None:
    path = write(folder / f"llava{suffix}", LLAVA)
    rows = list(load_conversations(path, streaming=streaming, eval_fraction=0)["train"])
    assert [words(row) for row in rows] == [
        [
            ("user", "What is it?", 1),
            ("assistant", "Red.", 0),
            ("user", "Sure?", 0),
            ("assistant", "Yes, <image> is a word here.", 0),
        ],
        [("system", "Be brief.", 0), ("user", "Compare  and", 2), ("assistant", "Green, blue.", 0)],
        [("user", "Hello", 0), ("assistant", "Hi", 0)],
    ]
    assert [[to_rgb(image).getpixel((0, 0)) for image in row["images"]] for row in rows] == [
        [COLOURS[0]],
        [COLOURS[1], COLOURS[2]],
        [],
    ]


def test_image_folder_elsewhere(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": chat(0), "image": "0.png"}])
    with pytest.raises(ValueError, match=r"row 0: images\[0\]: image '0.png' does not exist in the image folder"):
        load_conversations(path)
    assert load_conversations(path, image_folder=folder / "pictures")["train"][0]["images"][0].size == (12, 8)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet", "arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_alpaca_columns(folder: Path, suffix: str, streaming: bool) -> None:
    table = {
        "instruction": ["Add", "Say"],
        "input": ["1, 2", ""],
        "output": ["3", "NA"],
        "system": ["Be exact.", ""],
        "image": ["pictures/0.png", ""],
    }
    path = folder / f"alpaca.{suffix}"
    if suffix in ("csv", "tsv"):
        lines = [list(table), *zip(*table.values(), strict=True)]
        path.write_text("".join((("," if suffix == "csv" else "\t").join(f'"{c}"' for c in r)) + "\n" for r in lines))
    elif suffix == "arrow":
        Dataset.from_dict(table).save_to_disk(folder / "saved")
        (folder / "saved" / "data-00000-of-00001.arrow").rename(path)
    elif suffix == "parquet":
        Dataset.from_dict(table).to_parquet(path)
    else:
        write(path, [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)])
    rows = list(load_conversations(path, streaming=streaming, eval_fraction=0)["train"])
    assert [words(row) for row in rows] == [
        [("system", "Be exact.", 0), ("user", "Add\n1, 2", 1), ("assistant", "3", 0)],
        [("user", "Say", 0), ("assistant", "NA", 0)],
    ]


def test_where_to_conversation_does_not_fit_the_error_lists_the_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"talk": [], "photo": "a.png"}]))
    said = r"KeyError: 'messages'.*has the columns 'talk', 'photo'\. .*--columns messages=\.\.\. or .*images=photo$"
    with pytest.raises(ValueError, match=said):
        load_conversations(tmp_path / "rows.json", to_conversation=lambda row: {"messages": row["messages"]})


def test_an_image_folder_that_does_not_exist(folder: Path) -> None:
    with pytest.raises(ValueError, match="--image_folder 'nowhere': there is no such folder"):
        load_conversations(folder, image_folder="nowhere")


def test_columns_as_flags_say_them_come_before_to_conversation(folder: Path) -> None:
    path = write(folder / "a.jsonl", [{"ask": "Add", "what": "1, 2", "say": "3"}])
    flags = ["prompt=ask", "prompt=what", "response=say"]
    row = load_conversations(path, columns=flags, to_conversation=lambda row: {"messages": row["messages"]})["train"][0]
    assert words(row) == [("user", "Add\n1, 2", 0), ("assistant", "3", 0)]


def test_own_column_names_and_history(folder: Path) -> None:
    path = write(
        folder / "a.jsonl",
        [{"frage": "C?", "antwort": "c", "zuvor": [["A?", "a"], ["<image>B?", "b"]], "bild": "pictures/3.png"}],
    )
    names = ["prompt=frage", "response=antwort", "history=zuvor", "images=bild"]
    row = load_conversations(path, columns=names)["train"][0]
    assert [(role, text) for role, text, _ in words(row)] == [
        *(("user", "A?"), ("assistant", "a"), ("user", "B?"), ("assistant", "b"), ("user", "C?"), ("assistant", "c"))
    ]
    assert [images for _, _, images in words(row)] == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("splits", [False, True])
def test_image_folder_with_metadata(folder: Path, splits: bool) -> None:
    names = ("train", "test") if splits else ("",)
    for name in names:
        here = folder / "set" / name / "cats"
        here.mkdir(parents=True)
        (here / "x.png").write_bytes(png(1))
        write(here.parent / "metadata.jsonl", [{"file_name": "cats/x.png", "prompt": "What?", "response": name or "-"}])
    loaded = load_conversations(folder / "set", eval_fraction=0)
    assert list(loaded) == [name or "train" for name in names]
    for name, rows in loaded.items():
        assert words(rows[0]) == [("user", "What?", 1), ("assistant", name if splits else "-", 0)]
        assert rows[0]["images"][0].size == (13, 8)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "feature", "values"),
    [
        ("image", datasets.Image(), [picture(0), None]),
        ("images", List(datasets.Image()), [[picture(0)], []]),
        ("image", Value("binary"), [png(0), None]),
        ("images", List(Value("string")), [["pictures/0.png"], None]),
        ("images", List({"path": Value("string"), "bytes": Value("binary")}), [[{"bytes": png(0), "path": "x"}], []]),
    ],
    ids=["Image", "list of Image", "bytes", "list of names", "list of structs"],
)
def test_pictures_in_parquet(folder: Path, column: str, feature: Any, values: list[Any], streaming: bool) -> None:
    messages = [chat(0), [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]]
    features = Features({"messages": [{"role": Value("string"), "content": Value("string")}], column: feature})
    Dataset.from_dict({"messages": messages, column: values}, features=features).to_parquet(folder / "a.parquet")
    first, second = load_conversations(folder / "a.parquet", streaming=streaming, eval_fraction=0)["train"]
    assert words(first) == [("user", "Q0", 1), ("assistant", "A0", 0)]
    assert to_rgb(first["images"][0]).tobytes() == picture(0).tobytes()
    assert (words(second)[0], second["images"]) == (("user", "Hi", 0), [])


def test_pictures_inside_the_parts(folder: Path) -> None:
    part = {"type": "image", "image": "pictures/2.png"}
    message = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    path = write(folder / "a.jsonl", [{"messages": [message, {"role": "assistant", "content": "Blue."}]}])
    row = load_conversations(path)["train"][0]
    assert to_rgb(normalise(row["messages"], row["images"]).images[0]).getpixel((0, 0)) == COLOURS[2]
    part["image"] = "/etc/passwd"
    path = write(folder / "a.jsonl", [{"messages": [message, {"role": "assistant", "content": "Blue."}]}])
    with pytest.raises(ValueError, match=r"row 0: images\[0\]: image '/etc/passwd' lies outside"):
        load_conversations(path)


def test_text_only_rows_have_no_images(folder: Path) -> None:
    Dataset.from_dict({"question": ["a", "b"], "answer": ["c", "d"]}).to_parquet(folder / "a.parquet")
    rows = load_conversations(folder / "a.parquet", eval_fraction=0)["train"]
    assert [(*row, words(row)[1][1], row["images"]) for row in rows] == [
        ("messages", "images", "row", answer, []) for answer in ("c", "d")
    ]


def test_mixed_schemas_between_json_files(folder: Path) -> None:
    parts = [{"type": "text", "text": "Q"}]
    write(folder / "1.jsonl", [{"messages": chat(0), "images": "pictures/0.png"}])
    write(folder / "2.json", [{"messages": [{"role": "user", "content": parts}, chat(1)[1]], "images": [], "id": 7}])
    write(folder / "3.jsonl", [{"messages": json.dumps(chat(2)), "images": [{"path": "pictures/2.png"}], "id": "x"}])
    rows = load_conversations(folder, eval_fraction=0)["train"]
    assert [(words(row)[0], row["row"]) for row in rows] == [
        *((("user", "Q0", 1), 0), (("user", "Q", 0), 1), (("user", "Q2", 1), 2))
    ]


def test_splits_by_file_name(folder: Path) -> None:
    for name in ("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"):
        Dataset.from_dict({"prompt": [name], "response": ["x"]}).to_parquet(folder / f"{name}.parquet")
    loaded = load_conversations(folder)
    assert {key: words(rows[0])[0][1][:5] for key, rows in loaded.items()} == {"train": "train", "test": "valid"}
    loaded = load_conversations(folder, split="validation", eval_split="test")
    assert {key: words(rows[0])[0][1][:5] for key, rows in loaded.items()} == {"train": "valid", "test": "test-"}
    with pytest.raises(ValueError, match=r"no split 'tset' \(did you mean 'test'\?\); found"):
        load_conversations(folder, eval_split="tset")


def test_the_split_that_is_trained_on_is_not_held_out(folder: Path) -> None:
    """Even where its name is one of those that are held out."""
    names = [f"v{n}" for n in range(20)]
    Dataset.from_dict({"prompt": names, "response": ["x"] * 20}).to_parquet(folder / "validation.parquet")
    loaded = load_conversations(folder, split="validation", eval_fraction=0.2)
    trained, held_out = ({words(row)[0][1] for row in loaded[key]} for key in ("train", "test"))
    assert (len(trained), len(held_out)) == (16, 4)
    assert trained | held_out == {*names}


def test_as_many_are_held_out_as_asked_for(folder: Path) -> None:
    path = write(folder / "a.jsonl", [{"prompt": str(n), "response": "x"} for n in range(20)])
    for asked, held_out in ((3, 3), (5, 5), (19, 19), (None, 4)):
        loaded = load_conversations(path, max_eval_rows=asked)
        assert {key: len(rows) for key, rows in loaded.items()} == {"train": 20 - held_out, "test": held_out}
    with pytest.raises(ValueError, match=r"--num_eval_rows 20 of 20 rows leaves none to train on"):
        load_conversations(path, max_eval_rows=20)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"--num_eval_rows -3: expected how many rows to hold out, or 0"):
            load_conversations(path, max_eval_rows=-3, streaming=streaming)


def test_a_test_split_is_made_where_there_is_none(folder: Path) -> None:
    path = write(folder / "a.jsonl", [{"prompt": str(n), "response": "x"} for n in range(100)])

    def numbers(seed: int = 0, **options: Any) -> dict[str, list[int]]:
        loaded = load_conversations(path, seed=seed, **options)
        assert {drawn_seed(rows) for rows in loaded.values()} == {seed if "test" in loaded else None}
        return {name: [row["row"] for row in rows] for name, rows in loaded.items()}

    loaded = numbers(eval_fraction=0.1)
    assert loaded == numbers(eval_fraction=0.1)
    assert len(loaded["test"]) == 10
    assert sorted(loaded["train"] + loaded["test"]) == list(range(100))
    assert loaded["train"] == sorted(loaded["train"])
    assert numbers(eval_fraction=0) == {"train": list(range(100))}
    assert numbers(seed=1, eval_fraction=0.1) != loaded
    write(path, [{"prompt": "0", "response": "x"}])
    assert numbers(eval_fraction=0) == {"train": [0]}
    assert [len(rows) for rows in load_conversations(path).values()] == [1, 0]
    with pytest.raises(ValueError, match="--num_eval_rows 1 of 1 rows leaves none to train on"):
        load_conversations(path, max_eval_rows=1)


def test_a_stream_holds_out_its_first_rows_in_memory(folder: Path) -> None:
    path = write(folder / "a.jsonl", [{"prompt": str(n), "response": "x"} for n in range(20)])
    loaded = load_conversations(path, streaming=True, max_eval_rows=3)
    assert isinstance(loaded, IterableDatasetDict)
    assert isinstance(loaded["test"], Dataset)
    assert drawn_seed(loaded["test"]) is drawn_seed(loaded["train"]) is None
    assert [words(row)[0][1] for row in loaded["test"]] == ["0", "1", "2"]
    assert [row["row"] for row in loaded["train"]] == list(range(3, 20))
    with pytest.raises(ValueError, match="--num_eval_rows 500 holds out every row"):
        load_conversations(path, streaming=True)
    with pytest.raises(ValueError, match="--num_eval_rows 20 holds out every row"):
        load_conversations(path, streaming=True, max_eval_rows=20)
    for split in ("train", "validation"):
        Dataset.from_list(vsft_rows(4), features=VSFT).to_parquet(folder / "own" / f"{split}.parquet")
    own = load_conversations(folder / "own", streaming=True, max_eval_rows=2)
    assert [len(list(own["train"])), len(own["test"])] == [4, 2]
    assert to_rgb(own["test"][1]["images"][0]).tobytes() == picture(1).tobytes()


def test_text_is_converted_once_and_again_when_the_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = datasets.packaged_modules.generator.generator.Generator._generate_examples
    monkeypatch.setattr(
        datasets.packaged_modules.generator.generator.Generator,
        "_generate_examples",
        lambda self, **options: calls.append(1) or original(self, **options),
    )
    path = write(folder / "a.jsonl", [{"prompt": "1", "response": "x"}])
    for _ in range(2):
        assert words(load_conversations(path)["train"][0])[0][1] == "1"
    assert len(calls) == 1
    write(path, [{"prompt": "two", "response": "x"}])
    assert words(load_conversations(path)["train"][0])[0][1] == "two"
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"mesages": [], "image": 1}, None, r"among mesages, image \(did you mean 'mesages'\?\).*--columns messages="),
        ({"q": "a", "a": "b"}, ["prompt=q", "response=x"], r"no column 'x' for 'response'.*found: q, a"),
        ({"text": "a"}, ["message=text"], r"'message' is not a field \(did you mean 'messages'\?\)"),
        ({"q": "a", "a": "b"}, ["prompt=q"], "'prompt' and 'response' go together"),
        ({"q": "a", "a": "b"}, ["prompt=q", "a"], "'a' names no column; expected FIELD=COLUMN"),
        ({"messages": [{"role": "user"}]}, None, r"none of the first 1 rows.*row 0.*messages\[0\] has a content that"),
        ({"messages": chat(0), "images": 5}, None, r"row 0: images\[0\]: the image is a int; expected"),
        ({"messages": 5}, None, "`messages` is a int"),
        ({"prompt": "q", "response": "a", "history": [1]}, None, r"history is \[1\]; expected a list of"),
        (5, None, "row 0: the row is a int; expected an object with columns"),
    ],
)
def test_wrong_columns_are_named(folder: Path, row: Any, columns: Any, message: str) -> None:
    path = write(folder / "a.jsonl", [row])
    with pytest.raises(ValueError, match=message) as raised:
        load_conversations(path, columns=columns)
    assert str(raised.value).startswith(str(path))


def test_paths_and_files_that_do_not_serve_are_named(folder: Path) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "empty.json").write_text("[]")
    (folder / "a.txt").write_text("hello")
    (folder / "cut.json").write_text('[{"prompt": "a", "response": "b"}, {"prompt": "c", "resp')
    (folder / "none").mkdir()
    (folder / "two").mkdir()
    write(folder / "two" / "a.jsonl", [{"prompt": "a", "response": "b"}])
    Dataset.from_dict({"prompt": ["a"], "response": ["b"]}).to_parquet(folder / "two" / "b.parquet")
    Dataset.from_dict({"messages": [], "images": []}).save_to_disk(folder / "no_rows")
    (folder / "broken.parquet").write_bytes(b"PAR1 but not really")
    for name, message in (
        ("nowhere/data.jsonl", "it does not exist"),
        ("empty.jsonl", "it holds no row"),
        ("empty.json", "it holds no row"),
        ("a.txt", "it holds none of .parquet"),
        ("none", "it holds none of .parquet"),
        ("two", "files of several kinds"),
        ("no_rows", "it holds no row"),
        ("cut.json", r"cut.json: row 1 \(line 1\) cannot be read, nor what follows"),
        ("broken.parquet", "[Pp]arquet"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            load_conversations(folder / name)
        assert str(folder / name) in str(raised.value)


def test_pickled_data_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    (folder / "sub").mkdir()
    for name in ("rows.pkl", "sub/rows.pickle", "sub/rows.pt", "sub/rows.npy"):
        (folder / name).write_bytes(pickle.dumps(Payload()))
    for path in (folder / "rows.pkl", folder / "sub"):
        with pytest.raises(ValueError, match=r"it holds none of .parquet, .arrow, .json"):
            load_conversations(path)
    assert not (tmp_path / "executed").exists()


def test_a_name_that_is_no_path_is_looked_for_on_the_hub() -> None:
    with pytest.raises(ValueError, match=r"nobody/nothing \(no such path, so taken for a Hub id\)"):
        load_conversations("nobody/nothing")


def test_one_bad_row_raises_when_it_is_read_and_names_itself(folder: Path) -> None:
    rows = [{"messages": chat(n), "images": [f"pictures/{n % 4}.png"]} for n in range(10)]
    rows[4]["images"] = ["pictures/nine.png"]
    rows[6]["images"] = [None]
    lines = [json.dumps(row) for row in rows]
    lines[8] = lines[8][:30]
    path = folder / "a.jsonl"
    path.write_text("\n".join(lines))
    loaded = load_conversations(path, eval_fraction=0)["train"]
    for number, message in ((4, "'pictures/nine.png' does not"), (6, "is None"), (8, "the line is not JSON")):
        with pytest.raises(ValueError, match=rf"^row {number}: .*{message}"):
            loaded[number]
    assert words(loaded[9])[1][1] == "A9"
    with pytest.raises(ValueError, match=r"^row 4: "):
        list(DataLoader(loaded.select([9, 4]), batch_size=2, collate_fn=list))


@pytest.mark.parametrize("name", ["https://127.0.0.1:1/a.png", "file:///etc/hostname", "../out.png", "/etc/hostname"])
@pytest.mark.parametrize("stored", ["name", "Image"])
@pytest.mark.parametrize("streaming", [False, True])
def test_no_row_fetches_or_leaves_the_folder(folder: Path, name: str, stored: str, streaming: bool) -> None:
    (folder.parent / "out.png").write_bytes(png(0))
    if stored == "name":
        path = write(folder / "a.jsonl", [{"messages": chat(0), "images": [name]}])
    else:
        path = folder / "a.parquet"
        features = Features({"prompt": Value("string"), "response": Value("string"), "image": datasets.Image()})
        row = {"prompt": ["a"], "response": ["b"], "image": [{"path": name, "bytes": None}]}
        pq.write_table(Dataset.from_dict(row, features=features).data.table, path)  # to_parquet would read the file
    with pytest.raises(ValueError, match=r"row 0: images\[0\]: .*(is a URL|lies outside)"):
        load_conversations(path, streaming=streaming)
    if name == "../out.png":
        assert load_conversations(path, allow_outside=True)["train"][0]["images"][0].size == (12, 8)
        with pytest.raises(ValueError, match="allow_outside='no': expected True or False, as text counts as true"):
            load_conversations(path, allow_outside="no")


def test_rows_travel_to_workers_without_the_readers_of_other_datasets(folder: Path) -> None:
    path = write(folder / "a.jsonl", [{"messages": chat(n), "images": [f"pictures/{n}.png"]} for n in range(4)])
    rows = load_conversations(path, eval_fraction=0)["train"]
    load_conversations(path, to_conversation=lambda row: row)  # which cannot be pickled
    assert len(pickle.dumps(rows)) < 10_000
    batches = list(DataLoader(rows, batch_size=2, num_workers=2, collate_fn=lambda batch: [words(r) for r in batch]))
    assert [row[1][1] for batch in batches for row in batch] == ["A0", "A1", "A2", "A3"]


def test_datasets_are_mixed_by_the_function_of_datasets(folder: Path) -> None:
    """Those of one image folder and one `to_conversation`."""
    for name in "ab":
        rows = [{"messages": chat(n), "images": [f"pictures/{n % 4}.png"], "from": name} for n in range(40)]
        write(folder / f"{name}.jsonl", rows)
    how = {"to_conversation": numbered, "image_folder": folder, "max_eval_rows": 2}
    parts = [load_conversations(folder / f"{name}.jsonl", **how) for name in "ab"]
    mixed = interleave_datasets([part["train"] for part in parts], probabilities=[0.75, 0.25], seed=1)
    drawn = [(words(row)[1][1], row["row"]) for row in mixed]
    assert 0.65 < sum(answer.startswith("a") for answer, _ in drawn) / len(drawn) < 0.85
    assert all(answer[1:] == str(number) for answer, number in drawn)
    assert to_rgb(mixed[0]["images"][0]).getpixel((0, 0)) == COLOURS[mixed[0]["row"] % 4]


def numbered(row: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": row["from"] + row["messages"][1]["content"][1:]}
    return {"messages": [row["messages"][0], answer], "images": row["images"]}


def test_own_function_reads_rows_that_were_loaded_before(folder: Path, tmp_path: Path) -> None:
    """Columns named like ours, `row` and `source`, are no hindrance."""
    rows = [{"text": f"q{n}", "source": "web", "row": 100 + n} for n in range(3)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")

    def to_conversation(row: Any) -> dict[str, Any]:
        talk = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["source"]}]
        return {"messages": talk, "images": []}

    loaded = load_conversations(tmp_path / "saved", to_conversation=to_conversation, eval_fraction=0)["train"]
    assert [(row["row"], words(row)[1][1]) for row in loaded] == [(0, "web"), (1, "web"), (2, "web")]


def test_code_that_reads_otherwise_converts_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder / "a.jsonl", [{"prompt": "1", "response": "x"}])
    first = load_conversations(path)["train"].cache_files
    assert load_conversations(path)["train"].cache_files == first
    copy = folder / "formats.py"
    copy.write_text("# other code")
    monkeypatch.setattr("vlm_sft.data.datasets._CODE", (str(copy),))
    assert load_conversations(path)["train"].cache_files != first


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_file_is_read_row_by_row(folder: Path, suffix: str) -> None:
    """What is held at once does not grow with the file; `benchmarks/data.py` shows it for whole datasets."""
    text = "word " * 4000
    path = write(folder / f"a{suffix}", [{"prompt": text, "response": "x"}] * 1500)
    tracemalloc.start()
    assert sum(len(row["prompt"]) for row in read_rows(path)) == 1500 * len(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 30e6
    assert peak < 10e6
