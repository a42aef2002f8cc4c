"""What `check_rows` reports: the bad rows, by reason, and what is known of the good ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHOWN = 5  # rows of each reason
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row: its place in the checked dataset, its name. A repetition is not an error."""

    index: int
    row: str
    detail: str
    is_error: bool = True

    @property
    def reason(self) -> str:
        """The detail without its particulars and the remedy: the same for faults of one kind."""
        return _PARTICULARS.sub("…", self.detail.split(";")[0])


@dataclass(frozen=True)
class CheckReport:
    """`faults` in the order of the rows; `repairs` counts the images that are read differently from how they are
    stored; `columns` holds the tokens of each row [N] (0 for bad ones); `known` rows were remembered; `keys` [N] are
    equal for rows of equal content, b"" for bad ones; `numbers` [N] are those of the rows in their source;
    `contents` and `written` [N] tell each row and its files again."""

    rows: int
    checked_with: str
    faults: tuple[Fault, ...]
    repairs: Mapping[str, int]
    columns: Mapping[str, Any]
    known: int
    keys: Any = ()
    numbers: Any = ()
    sources: Any = ()
    answers: Any = ()
    contents: Any = ()
    written: Any = ()

    @property
    def keep(self) -> list[int]:
        """Indices of the good rows, for `dataset.select`."""
        bad = {fault.index for fault in self.faults}
        return [index for index in range(self.rows) if index not in bad]

    @property
    def bad_rows(self) -> int:
        return self.rows - len(self.keep)

    @property
    def errors(self) -> int:
        """Bad rows, those that only repeat others not counted."""
        return len({fault.index for fault in self.faults if fault.is_error})

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows checked with {self.checked_with}: {self.bad_rows:,} bad"]
        reasons: dict[str, list[Fault]] = {}
        for fault in self.faults:
            reasons.setdefault(fault.reason, []).append(fault)
        for faults in sorted(reasons.values(), key=len, reverse=True):
            names = ", ".join(fault.row for fault in faults[:SHOWN]) + ", ..." * (len(faults) > SHOWN)
            first = f"{faults[0].row}: " * any(fault.detail != faults[0].detail for fault in faults)
            lines += [f"{len(faults):>9,}  {names}", f"{'':9}  {first}{faults[0].detail}"]
        lines += [f"{count:>9,}  images {repair}" for repair, count in self.repairs.items()]
        ordered = np.sort(self.columns["length"][self.columns["length"] > 0])
        if len(ordered):
            shares = ((share, ordered[(len(ordered) - 1) * share // 100]) for share in (50, 90, 99, 100))
            lines.append("tokens per row: " + ", ".join(f"{share}% up to {length:,}" for share, length in shares))
        return "\n".join(lines)

    def to_jsonl(self, path: str | Path) -> None:
        """Writes a line for each fault: index, row, reason, detail."""
        lines = (json.dumps({**asdict(fault), "reason": fault.reason}, ensure_ascii=False) for fault in self.faults)
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
