"""Two bundles per task on disk, and a link that says which one answers.

    students/<task>/A.fedsa, B.fedsa    whole bundles as they were received, verified at every load
    students/<task>/active -> A.fedsa   replaced by one atomic rename
    students/<task>/highest             the highest version ever installed: never below it again
    students/<task>/<digest>.part       a download in progress, continued where it stopped

What the other slot is follows from its version: higher than the active one, it is the candidate; lower,
the previous one.
"""

from __future__ import annotations

import os
from pathlib import Path

from edge_teacher.files import sync_folder, write_atomically

SLOTS = ("A", "B")


class SlotFiles:
    """The folder of one task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def bundle(self, slot: str) -> Path:
        return self.folder / f"{slot}.fedsa"

    @property
    def active(self) -> str | None:
        link = self.folder / "active"
        name = link.readlink().stem if link.is_symlink() else None
        return name if name in SLOTS and self.bundle(name).exists() else None

    @property
    def other(self) -> str:
        return "B" if self.active == "A" else "A"

    def switch(self, slot: str) -> None:
        temporary = self.folder / ".active"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self.bundle(slot).name)
        temporary.replace(self.folder / "active")
        sync_folder(self.folder)

    @property
    def highest(self) -> int:
        try:
            return int((self.folder / "highest").read_text())
        except FileNotFoundError:
            return 0

    def raise_highest(self, version: int) -> None:
        if version > self.highest:
            write_atomically(self.folder / "highest", f"{version}\n".encode())

    def part(self, digest: str) -> Path:
        return self.folder / f"{digest}.part"

    def make_room(self, digest: str, total_bytes: int, most_bytes: int) -> None:
        """Give up other downloads, of any task and the oldest first, until all together fit `most_bytes`.

        Whoever sent them is told where to go on when the next piece comes: at the beginning.
        """
        ours = self.part(digest)
        others = [part for part in self.folder.parent.glob("*/*.part") if part != ours]
        others.sort(key=lambda part: part.stat().st_mtime)
        taken = total_bytes + sum(part.stat().st_size for part in others)
        for part in others:
            if taken <= most_bytes and part.parent != self.folder:
                continue
            taken -= part.stat().st_size
            part.unlink()

    def append(self, digest: str, offset: int, data: bytes) -> int:
        """Continue a download; data that does not continue it is ignored. The bytes there now."""
        part = self.part(digest)
        self.folder.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            if file.tell() == offset and data:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return file.tell()
