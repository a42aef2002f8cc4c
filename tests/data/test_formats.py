"""Rows as other projects write them are read as they are; what a row holds and nothing reads is said, never lost."""

from __future__ import annotations

import base64
import inspect
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets, interleave_datasets
from PIL import Image

from vlm_sft import ChatCollator, DataArguments, check_rows, load_conversations
from vlm_sft.chat.images import to_rgb
from vlm_sft.chat.messages import normalise, text_of
from vlm_sft.data.check_rows import check_report
from vlm_sft.data.files import split_of
from vlm_sft.training.config import unread_flags

pytestmark = pytest.mark.usefixtures("own_cache")

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
CAT = [("user", "What is it?", 1), ("assistant", "A cat.", 0)]
COLOUR = [("user", "And its colour?", 0), ("assistant", "Black.", 0)]
BRIEF = ("system", "Be brief.", 0)
READ = {  # the start of the text above a row of docs/data.md -> options, the conversation
    "TRL, the Hub": ({}, [*CAT, *COLOUR]),
    "TRL, transformers, Unsloth": ({}, CAT),
    "OpenAI": ({}, CAT),
    "Anthropic": ({}, [("user", "Which colour?", 1), ("assistant", "Red.", 0)]),
    "LLaVA, ShareGPT": ({}, CAT),
    "ms-swift": ({}, [BRIEF, ("user", "What is it?", 0), CAT[1], ("user", "And its colour?", 1), COLOUR[1]]),
    "Alpaca": ({}, CAT),
    "TRL, prompt": ({}, CAT),
    "Question and answer": ({}, CAT),
    "the_cauldron": ({}, CAT),
    "Images with captions": (
        {"prompt": "Describe it.", "system_prompt": "Be brief."},
        [BRIEF, ("user", "Describe it.", 1), ("assistant", "A black cat.", 0)],
    ),
    "Other column names": (
        {"columns": ["prompt=ask", "response=say", "images=photo", "ignore=thumbnail"]},
        CAT,
    ),
    "A list of messages": ({}, [("user", "What is a cat?", 0), ("assistant", "An animal.", 0)]),
}


def page_rows() -> dict[str, Any]:
    """The rows of docs/data.md, by the start of the text above each."""
    found, name = {}, ""
    for line in PAGE.split("## Where rows")[0].splitlines():
        name = line.removeprefix("**") if line.startswith("**") else name
        found |= {name: json.loads(line)} if line.startswith(("{", "[")) else {}
    return found


ROWS = page_rows()
QA = next(row for name, row in ROWS.items() if name.startswith("Question and answer"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (24, 16), colour).save(tmp_path / "data" / f"{name}.jpg")
    return tmp_path / "data"


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words(row: dict[str, Any]) -> list[tuple[str, str, int]]:
    messages = normalise(row["messages"], row["images"]).messages
    return [(m["role"], text_of(m), sum(part["type"] == "image" for part in m["content"])) for m in messages]


def red(row: dict[str, Any]) -> bool:
    return all(to_rgb(image).getpixel((0, 0))[0] > 200 for image in normalise(row["messages"], row["images"]).images)


def load(path: Any, **options: Any) -> Dataset:
    return load_conversations(path, eval_fraction=0, **options)["train"]


def options_of(name: str) -> tuple[dict[str, Any], list[Any]]:
    [found] = [what for start, what in READ.items() if name.startswith(start)]
    return found


def test_the_page_shows_a_row_of_each_format() -> None:
    assert {start for start in READ for name in ROWS if name.startswith(start)} == READ.keys()
    assert len(ROWS) == len(READ)


@pytest.mark.parametrize("how", ["lines", "array", "memory", "stream"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_page_is_read(name: str, how: str, folder: Path) -> None:
    options, expected = options_of(name)
    path = write(folder / "rows.jsonl", ROWS[name])
    if how == "array":
        path = folder / "rows.json"
        path.write_text(json.dumps([ROWS[name]], indent=2))
    if how == "memory" and isinstance(ROWS[name], dict):
        [row] = load([ROWS[name]], image_folder=folder, **options)
    else:
        [row] = load(path, streaming=how == "stream", **options)
    assert words(row) == expected
    assert red(row)


def test_all_formats_in_one_file_are_judged_row_by_row(folder: Path) -> None:
    known = [name for name in ROWS if not options_of(name)[0]]
    rows = load(write(folder / "rows.jsonl", *(ROWS[name] for name in known)))
    assert [words(row) for row in rows] == [options_of(name)[1] for name in known]


@pytest.mark.parametrize("name", [name for name in ROWS if not options_of(name)[0]])
def test_the_recipes_function_reads_what_the_library_knows(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it returns the row, as in most recipes, or asks for columns of its own dataset, as ChartQA's does."""

    def chart(row: dict[str, Any]) -> dict[str, Any]:
        asked = [{"role": "user", "content": row["ask_of_chart"]}, {"role": "assistant", "content": row["label"][0]}]
        return {"messages": asked, "images": [row["image"]]}

    path = write(folder / "rows.jsonl", ROWS[name])
    assert words(load(path, to_conversation=lambda row: row)[0]) == options_of(name)[1]
    assert "not used" not in capsys.readouterr().err.replace("columns that are not used: 'id'", "")
    assert words(load(path, to_conversation=chart)[0]) == options_of(name)[1]
    assert "to_conversation asks for a column 'ask_of_chart', which rows of" in capsys.readouterr().err


def test_to_conversation_is_not_replaced_where_it_fails_otherwise(folder: Path) -> None:
    path = write(folder / "rows.jsonl", QA)
    for wrong, told in (("questoin", r"KeyError: 'questoin' \(did you mean 'question'\?\)"), (5, "KeyError: 5")):
        function: Any = lambda row, wrong=wrong: {"messages": row[wrong] if wrong != 5 else [][5]}  # noqa: E731
        with pytest.raises(ValueError, match=told if wrong != 5 else "IndexError"):
            load(path, to_conversation=function)


def test_weights_say_which_answers_train(folder: Path) -> None:
    def talk(**fields: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **fields}]}

    for fields, train in (
        ({"loss": True}, True),
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"loss": None}, None),
    ):
        [row] = load(write(folder / "rows.jsonl", talk(**fields)))
        assert row["messages"][1].get("train") == train
    for fields, told in (
        ({"weight": 0.5}, r"messages\[1\] has the weight 0.5; expected true or false, 1 or 0"),
        (
            {"loss": True, "train": False},
            r"messages\[1\] says otherwise by loss than by another of train, loss, weight",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            load(write(folder / "rows.jsonl", talk(**fields)))
    asked = talk()
    asked["messages"][0]["loss"] = True
    with pytest.raises(ValueError, match=r"messages\[0\] \(user\) has the loss True; only answers are trained"):
        load(write(folder / "rows.jsonl", asked))


def test_of_a_prompt_in_messages_only_the_completion_trains(folder: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"prompt": [*turns, turns[0]], "completion": [turns[1]]}
    Dataset.from_list([row]).to_parquet(folder / "a.parquet")
    for path in (write(folder / "rows.jsonl", row), folder / "a.parquet"):
        assert [m.get("train") for m in load(path)[0]["messages"]] == [None, False, None, None]


def test_images_in_memory(folder: Path) -> None:
    """As Unsloth writes rows: PIL images inside the parts of a list of dicts; or a Dataset, a DatasetDict."""
    image = Image.new("RGBA", (24, 16), "red")
    part = {"type": "image", "image": image}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ]
    }
    [read] = load([row])
    assert (words(read), red(read)) == (CAT, True)
    assert load([{**QA, "image": image}])[0]["images"][0].size == (24, 16)
    features = Features({"question": Value("string"), "answer": Value("string"), "image": datasets.Image()})
    rows = Dataset.from_list(
        [{"question": f"Q{n}", "answer": "A", "image": image} for n in range(6)], features=features
    )
    few = rows.filter(lambda row: row["question"] in ("Q1", "Q3", "Q5"))
    assert [(row["row"], words(row)[0][1]) for row in load(few)] == [(0, "Q1"), (1, "Q3"), (2, "Q5")]
    assert {key: len(split) for key, split in load_conversations(rows.train_test_split(2)).items()} == {
        "train": 4,
        "test": 2,
    }
    for wrong, told in (
        (rows.with_transform(lambda batch: batch), "has a transform, which would not be applied; give it as to_conver"),
        (rows.to_iterable_dataset(), "the rows are a IterableDataset; expected a Dataset"),
        ([], "it holds no row"),
        ([{"messages": {1, 2}}], "row 0: it holds a set; expected text, numbers"),
    ):
        with pytest.raises(ValueError, match=told):
            load_conversations(wrong)
    streamed = load_conversations(rows.to_iterable_dataset(), streaming=True, max_eval_rows=2)
    assert [words(row)[0][1] for row in streamed["train"]] == ["Q2", "Q3", "Q4", "Q5"]


@pytest.mark.parametrize("stored", ["parquet", "names", "data URL"])
def test_to_conversation_gets_images_that_it_may_open_and_change(stored: str, folder: Path) -> None:
    if stored == "parquet":
        path = folder / "a.parquet"
        data = {"image": [str(folder / "a.jpg")] * 2, "text": ["A cat."] * 2}
        Dataset.from_dict(data, features=Features({"image": datasets.Image(), "text": Value("string")})).to_parquet(
            path
        )
    else:
        url = f"data:image/jpeg;base64,{base64.b64encode((folder / 'a.jpg').read_bytes()).decode()}"
        path = write(folder / "rows.jsonl", *[{"image": url if stored != "names" else "a.jpg", "text": "A cat."}] * 2)

    def half(row: dict[str, Any]) -> dict[str, Any]:
        image = row["image"] if isinstance(row["image"], Image.Image) else Image.open(row["image"])
        asked = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": row["text"]}]
        return {"messages": asked, "images": [image.convert("L").resize((12, 8))]}

    def whole(row: dict[str, Any]) -> dict[str, Any]:
        half(row)
        return {**half(row), "images": [row["image"]]}

    assert [row["images"][0].size for row in load(path, to_conversation=half)] == [(12, 8), (12, 8)]
    assert [row["images"][0].size for row in load(path, to_conversation=whole)] == [(24, 16), (24, 16)]
    named = load(path, to_conversation=whole, columns=["response=text"], prompt="What is it?")
    assert [words(row) for row in named] == [CAT, CAT]


# What was lost in silence


LATE = {
    "images": ({"images": ["a.jpg"]}, lambda row: words(row)[0][2] == 1),
    "system": ({"system": "Be brief."}, lambda row: words(row)[0] == BRIEF),
    "input": ({"input": "Look."}, lambda row: words(row)[0][1] == "What is it?\nLook."),
    "history": ({"history": [["a", "b"]]}, lambda row: len(words(row)) == 4),
}


@pytest.mark.parametrize("kind", ["lines", "parquet"])
@pytest.mark.parametrize("late", LATE)
def test_a_column_that_first_comes_late_is_read(late: str, kind: str, folder: Path) -> None:
    more, holds = LATE[late]
    rows = [{"instruction": "What is it?", "output": f"A{n}."} | (more if n == 70 else {}) for n in range(80)]
    path = write(folder / "rows.jsonl", *rows)
    if kind == "parquet":
        Dataset.from_list([{**dict.fromkeys(more), **row} for row in rows]).to_parquet(path := folder / "a.parquet")
    loaded = load(path)
    assert holds(loaded[70])
    assert not holds(loaded[69])


def test_image_in_one_row_and_images_in_another(folder: Path) -> None:
    asked = {"question": "What is it?", "answer": "A cat."}
    rows = load(write(folder / "rows.jsonl", {**asked, "images": ["a.jpg"]}, {**asked, "image": "b.jpg"}, asked))
    assert [(words(row)[0][2], red(row)) for row in rows] == [(1, True), (1, False), (0, True)]
    with pytest.raises(
        ValueError, match=r"'image' looks like images \('b.jpg'\).*images=images images=image, or .*ignore="
    ):
        load(write(folder / "rows.jsonl", {**asked, "images": ["a.jpg"], "image": "b.jpg"}))
    both = ["prompt=question", "response=answer", "images=images", "images=image"]
    assert words(load(folder / "rows.jsonl", columns=both)[0])[0][2] == 2


@pytest.mark.parametrize("column", ["context", "objects", "meta", "id", "score"])
@pytest.mark.parametrize("kind", ["lines", "parquet", "stream", "memory"])
def test_a_column_that_nothing_reads_is_said(
    column: str, kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{n}"}]} for n in range(80)
    ]
    at = 20 if kind == "stream" else 70
    rows = [row | {column: "x" if n == at else None} for n, row in enumerate(rows)]
    path: Any = write(folder / "rows.jsonl", *rows)
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path := folder / "a.parquet")
    load_conversations(rows if kind == "memory" else path, streaming=kind == "stream", max_eval_rows=2)
    where = f" (from row {at})"
    assert f"columns that are not used: {column!r}{where}" in capsys.readouterr().err
    load_conversations(path, columns=[f"ignore={column}"], max_eval_rows=2)
    assert "not used" not in capsys.readouterr().err


BYTES = io.BytesIO()
Image.new("RGB", (9, 9)).save(BYTES, "PNG")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("image_path", "a.jpg"),
        ("img", "pics/A.PNG"),
        ("photos", ["a.jpg", "b.jpg"]),
        ("picture", {"bytes": BYTES.getvalue(), "path": None}),
        ("picture", {"path": "a.jpg"}),
        ("blob", BYTES.getvalue()),
        ("thumb", "data:image/png;base64," + base64.b64encode(BYTES.getvalue()).decode()),
    ],
)
@pytest.mark.parametrize("at", [0, 70])
def test_a_column_that_looks_like_images_is_not_left_out_in_silence(
    column: str, value: Any, at: int, folder: Path
) -> None:
    rows = [{"question": f"Q{n}", "answer": "A.", column: value if n >= at else None} for n in range(80)]
    Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    said = (
        rf"the column '{column}' looks like images \(.*--columns prompt=question response=answer images={column}, or "
    )
    if at == 0:
        with pytest.raises(ValueError, match=said):
            load(folder / "a.parquet")
        with pytest.raises(ValueError, match=said):
            load(folder / "a.parquet", columns=["prompt=question", "response=answer"])
    else:
        report = check_report(load(folder / "a.parquet"), num_proc=0)
        assert [fault.index for fault in report.faults] == [*range(70, 80)]
        assert re.search(said, report.faults[0].detail)


def test_a_name_that_only_repeats_the_image_is_no_loss(folder: Path) -> None:
    rows = {"id": "x/a.jpg", "file": "a.jpg", **QA}
    assert words(load(write(folder / "rows.jsonl", rows))[0]) == CAT
    features = Features(
        {"question": Value("string"), "answer": Value("string"), "image": datasets.Image(), "name": Value("string")}
    )
    row = {"question": "What is it?", "answer": "A cat.", "image": Image.new("RGB", (9, 9)), "name": "cat.jpg"}
    assert words(load(Dataset.from_list([row], features=features))[0]) == CAT


def test_the_flags_that_an_error_offers_name_the_images(folder: Path) -> None:
    path = write(folder / "rows.jsonl", {"frage": "q", "antwort": "a", "bild_pfad": "a.jpg"})
    with pytest.raises(ValueError, match=r"name yours with --columns messages=\.\.\. or .* images=bild_pfad"):
        load(path)
    with pytest.raises(ValueError, match=r"to_conversation failed with KeyError: 'x'.*--columns .* images=bild_pfad"):
        load(path, to_conversation=lambda row: row["x"])


def line(number: int) -> str:
    return json.dumps({"prompt": f"Q{number}", "response": "A."})


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (f"[{line(0)}, {line(1)}]\n[{line(2)}]\n", 3),
        (f"[{line(0)}]{''.join(f'[{line(n)}]' for n in range(1, 30))}", 30),
        ("\n".join(json.dumps([json.loads(line(n))]) for n in range(4)), 4),
        (f"\n\n [{line(0)} , {line(1)}]  \n\n", 2),
        (
            "".join(
                f'[{{"role": "user", "content": "{n}"}}, {{"role": "assistant", "content": "a"}}]\n' for n in range(3)
            ),
            3,
        ),
        (f"\ufeff{line(0)}\n\n{line(1)}\n", 2),
    ],
)
def test_json_is_read_to_its_end(text: str, count: int, folder: Path) -> None:
    (folder / "rows.json").write_text(text, encoding="utf-8")
    assert len(load(folder / "rows.json")) == count


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        (
            "a.json",
            f"[{line(0)}]\nstray",
            r"a.json: row 1 \(line 2\) cannot be read, nor what follows: 'stray' after the ar",
        ),
        ("a.json", f"[{line(0)}]\n{line(1)}", r"row 1 \(line 2\) cannot be read"),
        ("a.json", f"[{line(0)}, {line(1)[:-3]}", r"row 1 \(line 1\) cannot be read"),
        ("a.json", json.dumps(json.loads(line(0)), indent=2), r"a.json is not JSON lines, nor .*pretty-.*jq -c"),
        (
            "a.json",
            json.dumps({"data": [json.loads(line(0))]}),
            "'data' is a list of objects: if these are the rows, give",
        ),
        ("a.json", json.dumps({"data": [json.loads(line(0))]}, indent=1), "pretty-printed"),
        ("a.jsonl", line(0).encode("utf-16"), "a.jsonl is not UTF-8 but UTF-16"),
        ("a.jsonl", line(0).encode("utf-16-le"), "a.jsonl is not UTF-8"),
        ("a.csv", "prompt,response\nq,a\n".encode("utf-16"), "a.csv is not UTF-8"),
        ("a.jsonl", "\n \n", "it holds no row"),
        ("a.csv", "", "it holds no row"),
        ("a.csv", "prompt,response\n", "it holds no row"),
        ("a.csv", "prompt;response\nq;a\n", "a.csv: its fields are separated by ';'; expected ','"),
        ("a.tsv", "prompt,response\nq,a\n", "a.tsv: its fields are separated by ','; expected '"),
        (
            "a.csv",
            'prompt,response\nq,a\n"q,a\nq,a\n',
            "the row that begins in line 3: unexpected end of data; a quote",
        ),
        (
            "a.csv",
            'prompt,response\n"q,a\n"q",a\n',
            "the row that begins in line 2: ',' expected after '\"'; a quote is n",
        ),
        ("a.csv", "prompt,response,prompt\nq,a,b\n", "a.csv: several columns are named 'prompt'"),
    ],
)
def test_files_that_are_not_rows_are_named(name: str, data: str | bytes, told: str, folder: Path) -> None:
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ValueError, match=told) as raised:
        load(folder / name)
    assert str(folder / name) in str(raised.value)


def test_a_csv_row_of_another_width_is_a_bad_row(folder: Path) -> None:
    (folder / "a.csv").write_text('prompt,response\nq,"a, b"\nq,c,d\nq\n"q\nr",e\n')
    rows = load(folder / "a.csv")
    assert [words(rows[n]) for n in (0, 3)] == [
        [("user", q, 0), ("assistant", a, 0)] for q, a in (("q", "a, b"), ("q\nr", "e"))
    ]
    faults = check_report(rows, num_proc=0).faults
    assert [fault.detail.split(";")[0] for fault in faults] == [
        "line 3 has 3 fields and the header 2",
        "line 4 has 1 fields and the header 2",
    ]
    (folder / "b.csv").write_text(f"prompt,response\nq,{'x' * 200_000}\n")
    assert len(words(load(folder / "b.csv")[0])[1][1]) == 200_000


@pytest.mark.parametrize(
    "name",
    [
        *("eval", "evaluation", "test", "tests", "testing", "validation", "validate", "valid", "val", "dev", "devset"),
        *(
            "holdout",
            "held_out",
            "held-out",
            "my_eval",
            "data-test-00000-of-00001",
            "Validation",
            "valset",
            "sub/test/a",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_held_out_by_their_name_are_not_trained_on(name: str, suffix: str, folder: Path) -> None:
    for stem, count in (("train", 3), (name, 2)):
        path = folder / f"{stem}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"{stem} {n}", "response": "a"} for n in range(count)]
        Dataset.from_list(rows).to_parquet(path) if suffix == "parquet" else write(path, *rows)
    assert {key: len(rows) for key, rows in load_conversations(folder).items()} == {"train": 3, "test": 2}


def test_names_that_may_mean_either_are_refused(folder: Path) -> None:
    for name in ("myeval", "valtest", "train_eval", "test/train", "testdata"):
        with pytest.raises(ValueError, match=r"rename it \(train, validation, test\), or give the file itself"):
            split_of(Path(f"{name}.jsonl"))
    for name in ("latest", "medieval", "contest", "part-0001", "device", "trainval", "a/interval", "data"):
        assert split_of(Path(f"{name}.jsonl")) == "train"
    write(folder / "train.jsonl", {"prompt": "a", "response": "b"})
    write(folder / "myeval.jsonl", {"prompt": "a", "response": "b"})
    with pytest.raises(ValueError, match=r"myeval.jsonl: the name holds 'myeval', which may mean rows to hold out"):
        load(folder)
    assert len(load(folder / "myeval.jsonl")) == 1


def test_hidden_files_are_no_data_and_other_json_is_named(folder: Path) -> None:
    write(folder / "train.jsonl", {"prompt": "a", "response": "b"})
    for name in (".hidden.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl", ".cache/a.parquet"):
        write(folder / name, {"prompt": "c", "response": "d"})
    assert len(load(folder)) == 1
    write(folder / "classes.json", {"name": "cat", "number": 1})
    with pytest.raises(
        ValueError, match=r"files of other rows lie beside train.jsonl: classes.json \(columns name, number\)"
    ):
        load(folder)


def test_so_many_rows_are_held_out_as_are_asked_for(folder: Path) -> None:
    path = write(folder / "rows.jsonl", *(json.loads(line(n)) for n in range(40)))
    for count in (0, 1, 5, 30, 39):
        assert [len(rows) for rows in load_conversations(path, max_eval_rows=count).values()] == [40 - count, count]
    assert [len(rows) for rows in load_conversations(path).values()] == [32, 8]
    with pytest.raises(ValueError, match="--num_eval_rows 40 of 40 rows leaves none to train on"):
        load_conversations(path, max_eval_rows=40)


def test_all_splits_are_in_one_report(folder: Path) -> None:
    for split in ("train", "test"):
        write(folder / f"{split}.jsonl", {"prompt": "<image>", "response": split, "image": f"{split}.png"})
    with pytest.raises(
        ValueError, match=r"(?s)split 'train': .*'train.png' does not .*split 'test': .*'test.png' does"
    ) as told:
        load_conversations(folder)
    assert f"in the image folder {str(folder)!r}; fix the path, or name the folder by --image_folder" in str(told.value)


def test_a_row_of_both_splits_is_said(folder: Path, capsys: pytest.CaptureFixture[str], tiny_processor: Any) -> None:
    write(folder / "train.jsonl", *(json.loads(line(n)) for n in range(5)))
    write(folder / "test.jsonl", *(json.loads(line(n)) for n in (3, 9)))
    check_rows(load_conversations(folder), ChatCollator(tiny_processor("llava15")), num_proc=0)
    assert "1 rows of test stand in train as well: row 3\n" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["prompt=question", "messages=m"])
def test_a_constant_question_is_for_rows_without_one(flags: str, folder: Path) -> None:
    path = write(folder / "rows.jsonl", {"image": "a.jpg", "question": "q", "answer": "a", "m": [], "caption": "c"})
    with pytest.raises(
        ValueError, match="--prompt is the question of every row, and this one has its own in 'question'"
    ):
        load(path, prompt="Describe it.")
    with pytest.raises(ValueError, match="--prompt is the question of every row; leave it out, or name 'response'"):
        load(path, prompt="Describe it.", columns=[flags])
    path = write(folder / "rows.jsonl", {"image": "a.jpg", "caption": "c"})
    with pytest.raises(ValueError, match=r"images with a caption in 'caption', give their question by --prompt"):
        load(path)


INFO = {
    "chat": {"file_name": "chat.json", "formatting": "sharegpt", "columns": {"messages": "talk", "images": "pics"}},
    "alpaca": {"file_name": "alpaca.json", "columns": {"prompt": "ask", "query": "more", "response": "say"}},
    "odd": {"file_name": "chat.json", "tags": {"role_tag": "speaker"}},
    "ranked": {"file_name": "chat.json", "ranking": True},
    "video": {"file_name": "chat.json", "columns": {"videos": "v"}},
}


def test_llama_factorys_list_names_files_and_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cat."}]
    (folder / "chat.json").write_text(json.dumps([{"talk": talk, "pics": ["a.jpg"]}]))
    (folder / "alpaca.json").write_text(json.dumps([{"ask": "What", "more": "is it?", "say": "A cat."}]))
    (folder / "dataset_info.json").write_text(json.dumps(INFO))
    for how in (
        {"name_or_path": folder / "chat"},
        {"name_or_path": folder, "config_name": "chat"},
        {"name_or_path": folder / "chat.json"},
    ):
        assert words(load_conversations(eval_fraction=0, **how)["train"][0]) == CAT
    assert "read as dataset_info.json says" in capsys.readouterr().err
    assert words(load(folder / "alpaca")[0])[0] == ("user", "What\nis it?", 0)
    for name, told in (
        (
            "chatt",
            r"dataset_info.json: no dataset 'chatt' \(did you mean 'chat'\?\) is listed.*listed are chat, alpaca",
        ),
        ("odd", "odd: role_tag=speaker: other names than role and content, from and value; use to_conversation"),
        ("ranked", "ranked: ranking: not read; give the file itself"),
        ("video", "video: columns videos: not read; only"),
        (".", "it lists several datasets; give one of them"),
    ):
        with pytest.raises(ValueError, match=told):
            load(folder / name)


def test_datasets_of_different_formats_mix(folder: Path) -> None:
    """Their own folders, columns and functions stay with their rows."""
    other = folder.parent / "other"
    other.mkdir()
    Image.new("RGB", (24, 16), "blue").save(other / "a.jpg")
    function: Callable[..., Any] = lambda row: {**row, "answer": f"{row['answer']} Yes."}  # noqa: E731
    row = {"image": "a.jpg", "question": "What is it?", "answer": "A cat."}
    first = load(write(folder / "a.jsonl", *[row] * 20), to_conversation=function)
    second = load(
        write(other / "b.jsonl", *[{"ask": "Which?", "say": "Blue.", "photo": "a.jpg"}] * 20),
        columns=["prompt=ask", "response=say", "images=photo"],
    )
    third = load([{"prompt": "text", "response": "x"}] * 20)
    mixed = interleave_datasets([first, second, third], probabilities=[0.5, 0.25, 0.25], seed=0)
    found = {(words(row)[1][1], words(row)[0][2], red(row)) for row in mixed}
    assert found == {("A cat. Yes.", 1, True), ("Blue.", 1, False), ("x", 0, True)}


def test_a_report_on_a_mixture_names_the_parts_of_rows(folder: Path) -> None:
    """Whose numbers are the same; equal rows of two parts are told."""
    good, bad = json.loads(line(1)), {"prompt": "Q", "response": " "}
    paths = write(folder / "a.jsonl", good, bad), write(folder / "b.jsonl", json.loads(line(2)))
    parts = [*map(load, paths), load([good], image_folder=folder)]
    report = check_report(concatenate_datasets(parts), num_proc=0)
    assert [(fault.row, fault.detail.split(";")[0]) for fault in report.faults if fault.is_error] == [
        (f"row 1 of {paths[0]}", "messages[1] is a blank answer")
    ]
    assert [(fault.row, fault.detail) for fault in report.faults if not fault.is_error] == [
        ("row 0 of a list in memory", f"repeats row 0 of {paths[0]}; drop one of them")
    ]


def test_columns_that_arrow_filled_with_none(folder: Path) -> None:
    rows = [{"messages": None, "question": "What is it?", "answer": "A cat.", "images": None, "image": "a.jpg"}]
    rows += [
        {
            "messages": ROWS[next(iter(ROWS))]["messages"][2:],
            "question": None,
            "answer": None,
            "images": None,
            "image": None,
        }
    ]
    features = Features({"question": Value("string"), "answer": Value("string"), "image": Value("string")})
    features["images"] = List(Value("string"))
    features["messages"] = [{"role": Value("string"), "content": Value("string"), "loss": Value("bool")}]
    DatasetDict({"train": Dataset.from_list(rows, features=features)}).save_to_disk(folder / "saved")
    assert [words(row) for row in load(folder / "saved", image_folder=folder)] == [CAT, COLOUR]


def test_several_answers_are_not_joined(folder: Path) -> None:
    row = {**QA, "answer": ["A cat."]}
    assert words(load(write(folder / "rows.jsonl", row))[0]) == CAT
    with pytest.raises(ValueError, match="'answer' holds 2 answers; choose one in to_conversation"):
        load(write(folder / "rows.jsonl", {**QA, "answer": ["A cat.", "A dog."]}))


def test_all_columns_of_images_are_named_at_once_and_urls_too(folder: Path) -> None:
    row = {"question": "q", "answer": "a", "first": "a.jpg", "second": "b.jpg"}
    with pytest.raises(
        ValueError, match=r"'first', 'second' looks like .*images=first images=second, or .*ignore=second"
    ):
        load(write(folder / "rows.jsonl", row))
    with pytest.raises(ValueError, match=r"'image_url' looks like images \('https://"):
        load(write(folder / "rows.jsonl", {"question": "q", "answer": "a", "image_url": "https://example.org/?id=7"}))
    boxes = {
        "messages": ROWS[next(iter(ROWS))]["messages"][:1],
        "images": ["a.jpg"],
        "objects": {"bbox": [[1, 2, 3, 4]]},
    }
    boxes["messages"] = [*boxes["messages"], {"role": "assistant", "content": "<bbox>"}]
    with pytest.raises(ValueError, match="'objects' is not read, and <bbox> and <ref-object> would be trained as they"):
        load(write(folder / "rows.jsonl", boxes))


def test_nothing_held_out_of_a_stream_and_splits_in_memory(folder: Path) -> None:
    path = write(folder / "rows.jsonl", *[QA] * 3)
    streamed = load_conversations(path, streaming=True, max_eval_rows=0)
    assert [len(list(streamed["train"])), len(streamed["test"])] == [3, 0]
    held = load_conversations({"train": [QA] * 3, "test": [QA]}, image_folder=folder)
    assert {name: len(rows) for name, rows in held.items()} == {"train": 3, "test": 1}


def test_one_bad_row_of_a_small_split_can_be_dropped(folder: Path, tiny_processor: Any) -> None:
    write(folder / "train.jsonl", *(json.loads(line(n)) for n in range(3)))
    write(folder / "test.jsonl", json.loads(line(8)), {"prompt": "Q", "response": " "})
    collator = ChatCollator(tiny_processor("llava15"))
    data = check_rows(load_conversations(folder), collator, on_bad_rows="drop", num_proc=0)
    assert {name: len(rows) for name, rows in data.items()} == {"train": 3, "test": 1}
    write(folder / "test.jsonl", {"prompt": "Q", "response": " "}, json.loads(line(8)))
    write(folder / "train.jsonl", json.loads(line(0)), {"prompt": "R", "response": " "})
    with pytest.raises(ValueError, match=r"more than --max_bad_fraction 0\.1 of the rows are bad"):
        check_rows(load_conversations(folder), collator, on_bad_rows="drop", num_proc=0)
    assert len(check_rows(load_conversations(folder), collator, on_bad_rows="drop", max_bad_fraction=0.5)["test"]) == 1


def test_flags_are_the_keywords_of_what_reads_and_checks() -> None:
    args = DataArguments()
    assert args.reading.keys() <= inspect.signature(load_conversations).parameters.keys()
    assert args.checking.keys() <= inspect.signature(check_rows).parameters.keys()
    assert unread_flags(args) == []


def test_splits_that_nothing_uses_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "validation", "test"):
        write(folder / f"{name}.jsonl", json.loads(line(0)))
    load_conversations(folder)
    assert "splits that are not used: test\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["videos", "video", "audios", "audio"])
@pytest.mark.parametrize("layout", ["messages", "conversations", "prompt"])
def test_columns_of_video_and_sound_are_refused_by_name(name: str, layout: str) -> None:
    turns = {"messages": ("role", "content", "user", "assistant"), "conversations": ("from", "value", "human", "gpt")}
    if layout == "prompt":
        row: dict[str, Any] = {"prompt": "What?", "response": "A cat."}
    else:
        who, what, user, assistant = turns[layout]
        row = {layout: [{who: user, what: "What?"}, {who: assistant, what: "A cat."}]}
    data = load_conversations(Dataset.from_list([{**row, name: []}, {**row, name: ["a.mp4"]}]), eval_fraction=0)
    with pytest.raises(ValueError, match=rf"row 1: the column '{name}' is not empty: video and sound are not trained"):
        data["train"][1]
    assert data["train"][0]["messages"]
