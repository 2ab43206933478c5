"""Who can be asked, who is set aside and why. A run does not end because one device does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import msgspec

from coordinator.parallel import in_parallel
from coordinator.progress import Progress
from coordinator.teachers import Teacher
from edge_teacher.contract.errors import CheckFailed, RpcError

Outcome = TypeVar("Outcome")

Online = Callable[[], Mapping[str, str]]
"""Who is on the broker now: name to identity, as `Teacher` has them."""


class Lost(msgspec.Struct, frozen=True, kw_only=True):
    """A teacher that was set aside.

    Attributes:
        stage: what it was asked for when it failed, such as `saliency` or `ask before round 8`; `end`
            for one that had answered everything, and was not there any more when training was over;
            `resume` for one that was not there when the run was gone on with.
        why: in one sentence.
        waited_s: seconds that went by before it was given up; of all attempts.
        reselected: it had been selected, and others were in its place.
        back: the stage at which it answered again; empty as long as it has not.
    """

    teacher: str
    stage: str
    why: str
    waited_s: float
    reselected: bool = False
    back: str = ""


class Roster:
    """The teachers of a run. For one thread, which the asking of all of them waits on."""

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        lost: list[Lost],
        progress: Progress,
        *,
        least: int = 1,
        online: Online | None = None,
        keep: Callable[[], None] = lambda: None,
    ) -> None:
        """`lost` is what an earlier session lost, and is added to; `keep` is called after each change.

        `least`: with fewer teachers than this the run ends. `online`: none, and all always are.
        """
        self._teachers = dict(teachers)
        self._lost = lost
        self._progress = progress
        self._least = least
        self._online = online or (lambda: {n: t.identity for n, t in teachers.items()})
        self._keep = keep

    @property
    def present(self) -> list[str]:
        """Names of those who can be asked, in order."""
        away = self._away()
        return sorted(name for name in self._teachers if name not in away)

    def ask(
        self,
        names: Iterable[str],
        question: Callable[[Teacher], Outcome],
        stage: str,
        advance: Callable[[], None] = lambda: None,
    ) -> dict[str, Outcome]:
        """What each of them answers, all at the same time; without those who fail, who are set aside.

        `question` raises CheckFailed for an answer that makes no sense. `advance` is called once for
        each. Raises CheckFailed, naming everyone, when too few are left; anything that is not a
        teacher's fault as it is.
        """
        asked = sorted(names)
        now = self._online()

        def attempt(name: str) -> tuple[Outcome | RpcError | CheckFailed, float]:
            teacher = self._teachers[name]
            if now.get(name, teacher.identity) != teacher.identity:
                return CheckFailed(f"{name} has another network than when the run began"), 0.0
            began = time.monotonic()
            answer: Outcome | RpcError | CheckFailed
            try:
                answer = question(teacher)
            except (RpcError, CheckFailed) as error:
                answer = error
            return answer, time.monotonic() - began

        answers: dict[str, Outcome] = {}
        for name, (answer, spent) in zip(asked, in_parallel(asked, attempt, advance), strict=True):
            if isinstance(answer, (RpcError, CheckFailed)):
                self._set_aside(name, stage, str(answer), spent)
            else:
                answers[name] = answer
                self._welcome(name, stage)
        self.require_least()
        return answers

    def returned(self) -> list[str]:
        """Of those who were set aside: who is on the broker, with the same network, and may be asked."""
        now = self._online()
        away = self._away().keys() & self._teachers.keys()
        return sorted(n for n in away if now.get(n) == self._teachers[n].identity)

    def replaced(self, names: Iterable[str]) -> None:
        """Those had been selected, and the selection was made again without them."""
        away = self._away()
        for name in names:
            self._change(away[name], reselected=True)
        self._keep()

    def roll_call(self, stage: str) -> None:
        """Name those who are not there any more, although nothing was asked of them in vain."""
        now = self._online()
        for name in self.present:
            if name not in now:
                why = f"{name} is not on the broker any more; what was asked of it it had answered"
                self._set_aside(name, stage, why, 0.0)

    def missing(self, known: Mapping[str, str]) -> None:
        """Set aside who is not here of those that the run began with, `known`: name to identity.

        One that is away already and has another network now is not asked any more, and said.
        """
        away = self._away()
        for name, identity in known.items():
            if name not in self._teachers and name not in away:
                why = f"{name} was not there when the run was gone on with"
                self._set_aside(name, "resume", why, 0.0)
            elif name in self._teachers and self._teachers[name].identity != identity:
                del self._teachers[name]
                self._progress.say(
                    f"{name} has another network than when the run began, and stays set aside"
                )
        if len(self._teachers) < self._least:
            self.require_least()

    def require_least(self) -> None:
        """Raises CheckFailed, naming everyone who was set aside and why, if too few are left."""
        left = len(self.present)
        if left >= self._least:
            return
        reasons = "; ".join(f"{n} ({one.stage}: {one.why})" for n, one in self._away().items())
        known = len(self._away().keys() | self._teachers.keys())
        raise CheckFailed(
            f"of {known} teacher{'s' * (known != 1)} {left} can be asked, and devices.least is "
            f"{self._least}: {reasons}. "
            "What was trained is kept, and the run can be gone on with when they are back."
        )

    def _away(self) -> dict[str, Lost]:
        return {one.teacher: one for one in self._lost if not one.back}

    def _set_aside(self, name: str, stage: str, why: str, waited_s: float) -> None:
        waited_s = round(waited_s, 2)
        # One that failed, came back and fails in the same way again is one story.
        known = [one for one in self._lost if one.teacher == name and one.why == why]
        before = self._away().get(name) or (known[-1] if known else None)
        if before is not None:
            whole = round(before.waited_s + waited_s, 2)
            self._change(before, waited_s=whole, why=why, back="")
        else:
            self._lost.append(Lost(teacher=name, stage=stage, why=why, waited_s=waited_s))
        asked = "" if stage == "resume" else f", asked for {stage}"
        self._progress.say(f"Set aside: {name}{asked}: {why}")
        self._keep()

    def _welcome(self, name: str, stage: str) -> None:
        before = self._away().get(name)
        if before is not None:
            self._change(before, back=stage)
            self._progress.say(f"{name} answers again, and takes part in the selection")
            self._keep()

    def _change(self, one: Lost, **changes: object) -> None:
        self._lost[self._lost.index(one)] = msgspec.structs.replace(one, **changes)
