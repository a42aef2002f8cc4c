"""Every row of a dataset looked at once before training: which would fail or teach nothing, and why.

`python -m vlm_sft.data.scan --dataset PATH` prints the bad rows by reason. `--model` adds what only the processor can
tell: reserved tokens in the text, what the chat template refuses, the length.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from vlm_sft import distributed as ranks
from vlm_sft.chat.images import repairs_of, to_rgb
from vlm_sft.chat.messages import Conversation, Message, check_turns, count_images, normalise, text_of

_NAME = re.compile(r"^(?:((?:\S+ )?row \d+)|example 0 of the batch): ")
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SHOWN = 5  # rows of each reason
_REPEATS = "repeats "


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row: `index` is its place in the dataset that was scanned, `row` its name."""

    index: int
    row: str
    detail: str

    @property
    def reason(self) -> str:
        """The detail without its particulars and the remedy: the same for faults of one kind."""
        return _PARTICULARS.sub("…", self.detail.split(";")[0])

    @property
    def harms(self) -> bool:
        """Not true of a repetition: it only weighs twice."""
        return not self.detail.startswith(_REPEATS)


@dataclass(frozen=True)
class ScanReport:
    """What a scan found: `faults` in the order of the rows; `repairs` counts the pictures that are read otherwise than
    they are stored; `lengths` holds the tokens of each good row where a collator was given."""

    rows: int
    scanned_with: str
    faults: tuple[Fault, ...]
    repairs: Mapping[str, int]
    lengths: tuple[int, ...]

    @property
    def keep(self) -> list[int]:
        """Indices of the good rows, for `dataset.select`."""
        bad = {fault.index for fault in self.faults}
        return [index for index in range(self.rows) if index not in bad]

    @property
    def bad_rows(self) -> int:
        return len({fault.index for fault in self.faults})

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows scanned with {self.scanned_with}: {self.bad_rows:,} bad"]
        reasons: dict[str, list[Fault]] = {}
        for fault in self.faults:
            reasons.setdefault(fault.reason, []).append(fault)
        for faults in sorted(reasons.values(), key=len, reverse=True):
            names = ", ".join(fault.row for fault in faults[:_SHOWN]) + ", ..." * (len(faults) > _SHOWN)
            first = f"{faults[0].row}: " * any(fault.detail != faults[0].detail for fault in faults)
            lines += [f"{len(faults):>9,}  {names}", f"{'':9}  {first}{faults[0].detail}"]
        lines += [f"{count:>9,}  pictures {repair}" for repair, count in self.repairs.items()]
        if ordered := sorted(self.lengths):
            shares = ((share, ordered[(len(ordered) - 1) * share // 100]) for share in (50, 90, 99, 100))
            lines.append("tokens per row: " + ", ".join(f"{share}% up to {length:,}" for share, length in shares))
        return "\n".join(lines)

    def to_jsonl(self, path: str | Path) -> None:
        """Writes a line for each fault: index, row, reason, detail."""
        with Path(path).open("w", encoding="utf-8") as file:
            for fault in self.faults:
                file.write(json.dumps({**asdict(fault), "reason": fault.reason}, ensure_ascii=False) + "\n")


def scan(
    dataset: Any,
    collator: Any = None,
    *,
    on_bad_rows: str = "report",
    max_bad_fraction: float = 0.1,
    max_aspect: float = 200,
    num_proc: int | None = None,
) -> ScanReport:
    """What is wrong with which rows; each is read, decoded and, with a `collator`, encoded, in `num_proc` processes.

    A row is bad if it cannot be read, its roles do not alternate, its pictures and image parts do not match, a picture
    does not open, is one pixel wide or more than `max_aspect` times as long as wide (Qwen's processors refuse it,
    LLaVA's cut it to a stripe), a text is blank or holds control characters, or the row repeats an earlier one.

    - `on_bad_rows`: with `"error"`, bad rows raise `ValueError` with the whole report, unless they only repeat others.
      With `"drop"` they are counted on stderr, and the caller goes on with `dataset.select(report.keep)`; a share above
      `max_bad_fraction`, repetitions not counted, raises.

    Every process of a launched run must call it; each looks at its share of the rows.
    """
    if on_bad_rows not in ("report", "error", "drop"):
        raise ValueError(f"on_bad_rows={on_bad_rows!r}; expected 'report', 'error' or 'drop'")
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise ValueError("the dataset to scan has no row, or streams; load it with streaming=False")
    faults: list[Fault] = []
    repairs: Counter[str] = Counter()
    lengths: list[int] = []
    seen: dict[bytes, str] = {}
    for finding in _look_at_all(_Look(dataset, collator, max_aspect), num_proc):
        details = finding.faults
        # A row that a mixture draws again has the same name, and is meant.
        if finding.digest and (first := seen.setdefault(finding.digest, finding.row)) != finding.row:
            details = [f"{_REPEATS}{first}; drop one of them"]
        faults += [Fault(finding.index, finding.row, detail) for detail in details]
        repairs.update(finding.repairs)
        lengths += [finding.length] if finding.length and not details else []
    processor = "no model's processor" if collator is None else type(collator.processor).__name__
    report = ScanReport(len(dataset), processor, tuple(faults), dict(repairs.most_common()), tuple(lengths))
    if on_bad_rows == "error" and any(fault.harms for fault in faults):
        raise ValueError(f"{report}\nmend these rows, or leave them out with on_bad_rows='drop'")
    if faults and on_bad_rows == "error":
        ranks.print_main(f"{report}\nthese rows stay; on_bad_rows='drop' leaves them out")
    if faults and on_bad_rows == "drop":
        if len({fault.index for fault in faults if fault.harms}) > max_bad_fraction * report.rows:
            raise ValueError(f"{report}\nmore than max_bad_fraction={max_bad_fraction} of the rows are bad; mend them")
        ranks.print_main(f"{report.bad_rows} of {report.rows} rows are left out.\n{report}")
    return report


def sound_rows(data: Any, collator: Any, *, on_bad_rows: str) -> Any:
    """The splits of `data` after a `scan` of each: `"error"` stops at bad rows, `"drop"` leaves them out and counts
    them, `"ignore"` looks at none, and a bad one stops the run when its turn comes."""
    if on_bad_rows not in ("error", "drop", "ignore"):
        raise ValueError(f"on_bad_rows={on_bad_rows!r}; expected 'error', 'drop' or 'ignore'")
    if on_bad_rows == "ignore":
        return data
    reports = {split: scan(rows, collator, on_bad_rows=on_bad_rows) for split, rows in data.items()}
    if on_bad_rows == "error":
        return data
    return type(data)({split: rows.select(reports[split].keep) for split, rows in data.items()})


@dataclass(frozen=True)
class _Finding:
    index: int
    row: str
    faults: list[str]
    repairs: list[str]
    digest: bytes | None
    length: int | None


@dataclass(frozen=True)
class _Look:
    """A map-style dataset of findings, so that a `DataLoader` spreads the work as it does in training."""

    dataset: Any
    collator: Any
    max_aspect: float

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Finding:
        name = f"row {index}"
        try:
            example = self.dataset[index]
            name = f"{example.get('source') or ''} row {example.get('row', index)}".lstrip()
            conversation = normalise(example.get("messages"), example.get("images"))
            check_turns(conversation.messages)
            faults = list(_text_faults(conversation.messages))
            repairs, decoded = self._decode(conversation, faults)
            if faults:
                return _Finding(index, name, faults, repairs, None, None)
            length = None if self.collator is None else len(self.collator.encode([decoded._asdict()])[0][0])
            return _Finding(index, name, [], repairs, _digest(decoded), length)
        except Exception as error:  # a chat template or a processor may raise anything; the scan goes on
            detail = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if named := _NAME.match(detail):
                name, detail = named[1] or name, detail[named.end() :]
            return _Finding(index, name, [detail], [], None, None)

    def _decode(self, conversation: Conversation, faults: list[str]) -> tuple[list[str], Conversation]:
        """What is repaired on the way, and the conversation with its pictures decoded; adds what is wrong with them."""
        repairs, decoded = [], []
        for number, image in enumerate(conversation.images):
            try:
                repairs += repairs_of(image)
                decoded.append(picture := to_rgb(image))
            except ValueError as error:
                faults.append(f"images[{number}]: {error}")
                continue
            shape = f"images[{number}]: {picture.width} x {picture.height} pixels"
            if min(picture.size) == 1:
                faults.append(f"{shape} show nothing; replace the picture or drop the row")
            elif max(picture.size) > self.max_aspect * min(picture.size):
                faults.append(f"{shape} are beyond {self.max_aspect:g} to 1; crop the picture or drop the row")
        return repairs, Conversation(conversation.messages, decoded)


def _look_at_all(look: Any, num_proc: int | None) -> list[_Finding]:
    """The findings in the order of the rows, each process of a launched run looking at its share."""
    state = PartialState()
    share = range(state.process_index, len(look), state.num_processes)
    if num_proc is None:
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        num_proc = min(len(share) // 256, cores)
    batches: Any = DataLoader(Subset(look, share), batch_size=64, collate_fn=list, num_workers=num_proc)
    findings: list[_Finding] = []
    with tqdm(total=len(share), desc="Scanning", unit=" rows", disable=not state.is_main_process) as progress:
        for batch in batches:
            findings += batch
            progress.update(len(batch))
    return sorted(gather_object(findings), key=lambda finding: finding.index)


def _text_faults(messages: Sequence[Message]) -> Iterator[str]:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(message.get("train", True) for message in answers):
        yield "no answer is to be trained on; leave one without 'train': false, or drop the row"
    for number, message in enumerate(messages):
        text = text_of(message)
        if control := _CONTROL.search(text):
            yield f"messages[{number}] holds the control character U+{ord(control[0]):04X}; remove it or drop the row"
        if text.strip() or not message.get("train", True):
            continue
        if message["role"] == "assistant":
            yield f"messages[{number}] is a blank answer; give it words, mark it 'train': false or drop the row"
        elif not count_images([message]):
            yield f"messages[{number}] ({message['role']}) is blank; give it words or drop the row"


def _digest(decoded: Conversation) -> bytes:
    """Equal for rows with the same words and the same pixels."""
    digest = hashlib.blake2b(json.dumps(decoded.messages).encode(), digest_size=16)
    for picture in decoded.images:
        digest.update(repr(picture.size).encode() + picture.tobytes())
    return digest.digest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Scans one split of a dataset and prints the report; 1 if a row is bad."""
    from vlm_sft import ChatCollator, load_conversations, load_processor

    parser = argparse.ArgumentParser(prog="python -m vlm_sft.data.scan", description=__doc__)
    parser.add_argument("--dataset", required=True, help="Hub id, file or folder")
    parser.add_argument("--split", default="train")
    parser.add_argument("--columns", nargs="*", metavar="FIELD=COLUMN", help="as in prompt=question")
    parser.add_argument("--image_folder", help="what file names in rows are relative to")
    parser.add_argument("--allow_outside", action="store_true", help="let file names lead out of the image folder")
    parser.add_argument("--max_rows", type=int, help="scan the first rows only")
    parser.add_argument("--model", help="check with this model's processor too")
    parser.add_argument("--max_length", type=int, help="rows of more tokens are bad (needs --model)")
    parser.add_argument("--num_proc", type=int, help="processes (default: one per core)")
    parser.add_argument("--to_jsonl", metavar="FILE", help="write the faults, one on each line")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or the tokenizer warns in each process
    try:
        rows = load_conversations(
            options.dataset,
            split=options.split,
            eval_fraction=0,
            columns=options.columns,
            image_folder=options.image_folder,
            allow_outside=options.allow_outside,
            max_rows=options.max_rows,
        )["train"]
        processor = load_processor(options.model) if options.model else None
        collator = ChatCollator(processor, max_length=options.max_length) if processor else None
    except ValueError as error:
        parser.error(str(error))
    report = scan(rows, collator, num_proc=options.num_proc)
    print(report)
    if options.to_jsonl:
        report.to_jsonl(options.to_jsonl)
    return 1 if report.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
