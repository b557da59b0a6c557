"""Files of one text a line, read no further than somebody asks.

    with Lines("probes.jsonl", Path("probes.jsonl")) as lines:
        where, text = next(lines.filled())     # "'probes.jsonl' line 1", '{"prompt": "2 + 2 =", "answer": " 4"}'
        lines.count_rest()                     # how many follow

A file of many gigabytes, of which ten lines are wanted, costs ten lines. A pipe will do as well.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hookdepth.errors import HookdepthError

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")  # gzip, bzip2, xz, zstd, zip
_LONGEST_LINE = 64 << 20
_COUNTED_BYTES = 1 << 30  # a second of reading


class Lines:
    """The lines of a file or a pipe that are not blank: see the module. `name` is what errors call it.

    Raises:
        HookdepthError: where it is read: it may not be, is compressed, binary or not UTF-8, or a line has no end.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path

    def __enter__(self) -> Lines:
        """Open the file."""
        try:
            self.file: BinaryIO = open(self.path, "rb")  # closed on leaving
        except OSError as error:
            raise self._unreadable(error) from error
        self.rest = self._split()
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.file.close()

    def filled(self) -> Iterator[tuple[str, str]]:
        """Where each of the next lines stands, and what it says."""
        for number, line in self.rest:
            where = f"{self.name!r} line {number}"
            if b"\0" in line:
                raise HookdepthError(f"{self.name!r} is a binary file", "give a .jsonl or text file in UTF-8")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise HookdepthError(f"{where} is not UTF-8", "save the file in UTF-8") from error
            if text.strip():
                yield where, text

    def count_rest(self) -> int | None:
        """How many lines follow that are not blank; None for some, where counting could take long."""
        about = os.fstat(self.file.fileno())
        filled = (1 for _, line in self.rest if line.strip())
        if stat.S_ISREG(about.st_mode) and about.st_size <= _COUNTED_BYTES:
            return sum(filled)
        return None if next(filled, 0) else 0

    def _split(self) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of each line; lines end as on Unix, Windows or old Macs."""
        number = 0
        while block := self._block():
            if not number and block.startswith(_COMPRESSED):
                raise HookdepthError(f"{self.name!r} is compressed", "decompress it first")
            ended = block.endswith(b"\n")
            for line in (block[: -1 - block.endswith(b"\r\n")] if ended else block).split(b"\r"):
                number += 1
                if len(line) > _LONGEST_LINE:
                    what = f"{self.name!r} line {number} is longer than {_LONGEST_LINE >> 20} MiB"
                    raise HookdepthError(what, "give a file with one prompt a line")
                yield number, line

    def _block(self) -> bytes:
        try:
            return self.file.readline(_LONGEST_LINE + 1)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> HookdepthError:
        return HookdepthError(f"cannot read {self.name!r} ({error.strerror})", "give a file that you may read")
