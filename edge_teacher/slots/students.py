"""The students of a device, by task: offered, verified, proved on a canary batch, active, rolled back."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_teacher import bundle as bundles
from edge_teacher.bundle import Bundle, StudentCard
from edge_teacher.contract.errors import (
    CheckFailed,
    FedsaError,
    Malformed,
    NotAllowed,
    NotFound,
    TooLarge,
    UsageError,
)
from edge_teacher.contract.messages import Received, StudentOffer, StudentStatus
from edge_teacher.contract.topics import check_name
from edge_teacher.runtime import LiveSession, Model
from edge_teacher.slots.canary import Canary
from edge_teacher.slots.slot_files import SLOTS, SlotFiles

log = logging.getLogger(__name__)

MAX_TASKS = 16
"""Tasks whose students one device keeps."""

_DIGEST = re.compile(r"[0-9a-f]{64}")

Load = Callable[[Model], LiveSession]
"""Opens a model on this device's runtime."""


@dataclass(frozen=True)
class ActiveStudent:
    card: StudentCard
    session: LiveSession
    canary: Canary

    def measured(self) -> dict[str, Any]:
        """Of the graph that answers now, as fields of the status: a better one may follow the first."""
        dialect = self.session.info.precision
        proof = self.canary.proofs[dialect]
        return {
            "canary_agreement": proof.agreement,
            "canary_ms_per_image": proof.ms_per_image,
            "runtime_file": self.card.graphs[dialect],
        }


class Students:
    """Keeps at most two versions per task under `folder`; one of them answers."""

    def __init__(
        self,
        folder: Path,
        trusted: list[Ed25519PublicKey],
        load: Load,
        *,
        dialects: tuple[str, ...],
        max_bundle_bytes: int,
    ) -> None:
        """`dialects`: the graphs this device's runtime can execute, best first."""
        self._folder = folder
        self._trusted = trusted
        self._load = load
        self._dialects = dialects
        self._max_bundle_bytes = max_bundle_bytes
        self._active: dict[str, ActiveStudent] = {}
        self._status: dict[str, StudentStatus] = {}
        for task_folder in sorted(folder.glob("*/")):
            self._restore(task_folder.name)

    def reconfigure(self, trusted: list[Ed25519PublicKey], max_bundle_bytes: int) -> None:
        """Other keys and another size, from the next offer on. What is installed stays: it was trusted."""
        self._trusted = trusted
        self._max_bundle_bytes = max_bundle_bytes

    def active(self, task: str) -> ActiveStudent:
        """Raises NotFound where no student answers for `task`."""
        if task not in self._active:
            known = ", ".join(sorted(self._active)) or "none"
            raise NotFound(f"no student for the task {task!r} is active here (active: {known})")
        return self._active[task]

    def status(self, task: str) -> StudentStatus:
        status = self._status.get(task) or StudentStatus(task=task)
        active = self._active.get(task)
        return status if active is None else msgspec.structs.replace(status, **active.measured())

    def close(self) -> None:
        """End what is being prepared for them."""
        for student in self._active.values():
            student.session.close()

    def statuses(self) -> tuple[StudentStatus, ...]:
        """Of the tasks of which a version was ever verified here."""
        return tuple(
            self.status(task) for task in sorted(self._status) if self._files(task).highest
        )

    def offer(self, offer: StudentOffer, data: bytes) -> Received:
        """Take a piece of a bundle; verify and install it into the free slot once it is whole.

        Raises Malformed, NotAllowed for a version already passed, TooLarge, and CheckFailed for a bundle
        that is damaged, not signed by a trusted key, not what the offer said, or unusable on this runtime.
        """
        if not self._trusted:
            raise NotAllowed(
                "this device takes no students: it was started without a coordinator's public key"
            )
        if not _DIGEST.fullmatch(offer.digest):
            # It becomes part of a file's name.
            raise Malformed(f"the digest {offer.digest!r} is no SHA-256 in hexadecimal digits")
        files = self._files(offer.task)
        whole = Received(next_offset=offer.total_bytes, total_bytes=offer.total_bytes)
        if self._installed(files, offer):
            return whole
        if offer.version <= files.highest:
            raise NotAllowed(
                f"version {offer.version} of {offer.task!r} is not newer than {files.highest}, "
                "which this device has had; raise the version, or ask for student.rollback"
            )
        if offer.total_bytes > self._max_bundle_bytes:
            raise TooLarge(
                f"a bundle of {offer.total_bytes} bytes exceeds this device's limit of "
                f"{self._max_bundle_bytes}"
            )
        if offer.offset + len(data) > offer.total_bytes:
            raise CheckFailed(f"the offer of {offer.task!r} sends more bytes than it announced")
        if not files.folder.exists() and len(list(self._folder.glob("*/"))) >= MAX_TASKS:
            raise TooLarge(f"this device keeps students of {MAX_TASKS} tasks, and has as many")
        files.make_room(offer.digest, offer.total_bytes, self._max_bundle_bytes)
        held = files.append(offer.digest, offer.offset, data)
        if held < offer.total_bytes:
            self._note_offer(offer.task, "downloading", "")
            return Received(next_offset=held, total_bytes=offer.total_bytes)
        part = files.part(offer.digest)
        try:
            name = f"the bundle offered for {offer.task!r}"
            found = bundles.unpack(part.read_bytes(), self._trusted, name=name)
            self._check(found, offer)
        except FedsaError as error:
            part.unlink()
            self._note_offer(offer.task, "failed", str(error))
            raise
        part.replace(files.bundle(files.other))
        files.raise_highest(offer.version)
        self._note(offer.task, state="verified", problem="", **self._versions(offer.task, files))
        return whole

    def activate(self, task: str, version: int) -> None:
        """Prove the installed `version` on its canary batch, then switch to it.

        Raises NotFound if it is not installed, CheckFailed if it fails: then the old one goes on.
        """
        files = self._files(task)
        for slot in SLOTS:
            found = self._in_slot(files, slot)
            if found is not None and found[1].version == version:
                self._switch(task, files, slot, *found)
                return
        raise NotFound(f"version {version} of {task!r} is not installed here: offer it first")

    def rollback(self, task: str) -> None:
        """Back to the version before. Raises NotFound if there is none."""
        files = self._files(task)
        previous = self.status(task).previous_version
        if not previous:
            raise NotFound(f"there is no previous version of {task!r} to go back to")
        self.activate(task, previous)
        log.warning("rolled %s back to version %d in slot %s", task, previous, files.active)

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _files(self, task: str) -> SlotFiles:
        return SlotFiles(self._folder / check_name(task))

    def _installed(self, files: SlotFiles, offer: StudentOffer) -> bool:
        """Whether exactly this bundle is in a slot: a repeated offer has nothing more to send."""
        status = self.status(offer.task)
        if offer.version not in (status.active_version, status.candidate_version):
            return False
        return any(
            found is not None and found[0].digest == offer.digest
            for found in (self._in_slot(files, slot) for slot in SLOTS)
        )

    def _in_slot(self, files: SlotFiles, slot: str) -> tuple[Bundle, StudentCard] | None:
        """The student there. None also for one that is damaged, or whose key is trusted no more."""
        try:
            found = bundles.read(files.bundle(slot), self._trusted)
        except FedsaError:
            return None
        return (found, found.card) if isinstance(found.card, StudentCard) else None

    def _versions(self, task: str, files: SlotFiles) -> dict[str, int]:
        """What the slots hold, as fields of the status: see `slot_files`."""
        active = self._active[task].card.version if task in self._active else 0
        found = self._in_slot(files, files.other)
        other = 0 if found is None else found[1].version
        return {
            "active_version": active,
            "previous_version": other if other < active else 0,
            "candidate_version": other if other > active else 0,
        }

    def _check(self, found: Bundle, offer: StudentOffer) -> StudentCard:
        card = found.card
        if not isinstance(card, StudentCard):
            raise CheckFailed(f"the bundle offered for {offer.task!r} holds no student")
        if (card.task, card.version, found.digest) != (offer.task, offer.version, offer.digest):
            raise CheckFailed(
                f"the bundle is version {card.version} of {card.task!r}, not the version "
                f"{offer.version} of {offer.task!r} with the digest that was offered"
            )
        self._dialect(card)
        return card

    def _dialect(self, card: StudentCard) -> str:
        for dialect in self._dialects:
            if dialect in card.graphs:
                return dialect
        raise CheckFailed(
            f"the student {card.task!r} comes as {', '.join(card.graphs)}; this device's runtime "
            f"executes {', '.join(self._dialects)}"
        )

    def _switch(
        self, task: str, files: SlotFiles, slot: str, found: Bundle, card: StudentCard
    ) -> None:
        try:
            self._dialect(card)
            canary = Canary(found, card)
            session = self._load(canary.model(found))
        except FedsaError as error:
            self._note(task, state="failed", problem=str(error))
            raise
        files.switch(slot)
        before = self._active.get(task)
        self._active[task] = ActiveStudent(card, session, canary)
        if before is not None:
            before.session.close()
        status = StudentStatus(task=task, state="active")
        self._status[task] = msgspec.structs.replace(status, **self._versions(task, files))
        log.info("%s version %d is active (%s)", task, card.version, session.info.precision)

    def _note_offer(self, task: str, state: Literal["downloading", "failed"], problem: str) -> None:
        """What became of an offer that nobody has vouched for: no word about the student that answers."""
        if task in self._active:
            self._note(task, problem=problem)
        else:
            self._note(task, state=state, problem=problem)

    def _note(self, task: str, **changes: object) -> None:
        self._status[task] = msgspec.structs.replace(self.status(task), **changes)

    def _restore(self, task: str) -> None:
        """After a start: what the link names answers again, once it has proved itself again."""
        try:
            files = self._files(task)
        except UsageError:
            log.warning("%s is no folder of a task, and is left alone", self._folder / task)
            return
        slot = files.active
        try:
            if slot is not None:
                found = bundles.read(files.bundle(slot), self._trusted)
                if not isinstance(found.card, StudentCard):
                    raise CheckFailed(f"the bundle in slot {slot} of {task!r} holds no student")
                self._switch(task, files, slot, found, found.card)
        except FedsaError as error:
            log.warning("the student of %s cannot be restored: %s", task, error)
            self._note(task, state="failed", problem=str(error), **self._versions(task, files))
            return
        versions = self._versions(task, files)
        if slot is None and versions["candidate_version"]:
            self._note(task, state="verified", **versions)
