"""What `check_rows` reports: the bad rows, by reason, and what is known of the good ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_sft.data.records import COLUMNS

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
    """`found` is an array of `vlm_sft.data.check_rows.FOUND` in the order of the rows, `faults` are in that order too;
    `repairs` counts the images that are read differently from how they are stored."""

    checked_with: str
    found: Any
    faults: tuple[Fault, ...]
    repairs: Mapping[str, int]

    @property
    def rows(self) -> int:
        return len(self.found)

    @property
    def columns(self) -> dict[str, Any]:
        """The tokens of each row [N], 0 for bad ones."""
        return {name: self.found[name] for name in COLUMNS}

    @property
    def known(self) -> int:
        """How many rows were remembered."""
        return len(np.unique(self.found["place"][self.found["known"]]))

    @property
    def keep(self) -> list[int]:
        """Indices of the good rows, for `dataset.select`."""
        bad = {fault.index for fault in self.faults}
        return [index for index in range(self.rows) if index not in bad]

    @property
    def bad_rows(self) -> int:
        return len({fault.index for fault in self.faults})

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
        if lengths := sorted(self.found["length"][self.found["length"] > 0].tolist()):
            shares = (f"{share}% up to {lengths[(len(lengths) - 1) * share // 100]:,}" for share in (50, 90, 99, 100))
            lines.append(f"tokens per row: {', '.join(shares)}")
        return "\n".join(lines)

    def to_jsonl(self, path: str | Path) -> None:
        """Writes a line for each fault: index, row, reason, detail."""
        lines = (json.dumps({**asdict(fault), "reason": fault.reason}, ensure_ascii=False) for fault in self.faults)
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
