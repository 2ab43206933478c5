"""Several processes that train one student together, as torchrun starts them.

Every process runs the same program on the same settings. Where one of them knows something that the
others do not, it is said here; alone, a process has nothing to say and all of this costs nothing.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coordinator.config import DistributedConfig
from edge_teacher.contract.errors import FedsaError, UsageError

T = TypeVar("T")

_GLOO = re.compile(r"gloo|Connection (closed|reset|refused)|[Tt]imed out waiting|Broken pipe")


class Apart(FedsaError):
    """The processes of a run have lost each other. No fault of a teacher, and not to be taken for one."""


@dataclass(frozen=True)
class Ranks:
    """This process's number among `world`. The first writes what is written, and speaks to people."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Its number on this machine, and so its GPU's."""
    local_world: int = 1
    silence_s: float = 0.0
    group: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    def rows(self, count: int) -> Tensor:
        """Which of `count` rows are this process's: int64[about count / world]."""
        return torch.arange(self.rank, count, self.world)

    def first_does(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them. An error there is raised in all of them."""
        if self.alone:
            return make()
        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = make()
            except FedsaError as error:
                said[1] = error
        with speaking():
            dist.broadcast_object_list(said, src=0, group=self.group)
        if said[1] is not None:
            raise said[1]
        made: T = said[0]
        return made

    def require_same(self, what: str, mine: object) -> None:
        """Raises UsageError in all processes if `mine` is not the same in all of them."""
        if self.alone:
            return
        everyone = self.gather(mine)
        odd = [str(rank) for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
        if odd:
            raise UsageError(
                f"{what} of process {', '.join(odd)} are not those of process 0; "
                "start all processes with the same settings and the same data"
            )

    def gather(self, mine: object, group: Any = None) -> list[Any]:
        """What every process gives here, by rank."""
        everyone: list[Any] = [None] * self.world
        with speaking():
            dist.all_gather_object(everyone, mine, group=group or self.group)
        return everyone

    def gather_tensors(self, mine: Tensor, group: Any) -> list[Tensor]:
        """Tensors of one shape and type, by rank."""
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        with speaking():
            dist.all_gather(everyone, mine.contiguous(), group=group)
        return everyone

    def agree(self, mine: bool) -> bool:
        """The first process's decision. All must ask at the same step."""
        if self.alone:
            return mine
        said = torch.tensor([mine])
        with speaking():
            dist.broadcast(said, src=0, group=self.group)
        return bool(said)

    def mean(self, mine: float) -> float:
        if self.alone:
            return mine
        total = torch.tensor([mine], dtype=torch.float64)
        with speaking():
            dist.all_reduce(total, group=self.group)
        return float(total) / self.world

    def even_out(self, nets: Iterable[nn.Module]) -> None:
        """Make batch norm's running statistics the mean of all processes', which saw other images."""
        if self.alone:
            return
        buffers = [b for net in nets for b in net.buffers() if b.is_floating_point()]
        if not buffers:
            return
        flat = torch.cat([b.flatten() for b in buffers])
        with speaking():
            dist.all_reduce(flat, group=self.group)
        flat /= self.world
        start = 0
        for buffer in buffers:
            buffer.copy_(flat[start : start + buffer.numel()].view_as(buffer))
            start += buffer.numel()

    def new_group(self) -> Any:
        """A channel of its own, for one thread. All processes make the same ones in the same order."""
        with speaking():
            return dist.new_group(backend="gloo", timeout=timedelta(seconds=self.silence_s))

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module`, with gradients that are the mean of all processes'."""
        if self.alone:
            return module
        # Of 1x1 convolutions, whose strides can be written in two ways; it is about speed only.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        # The word that replaces it is not in every torch that this runs with.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        # Buffers are evened out by us, and not overwritten with the first process's.
        with speaking():
            return DistributedDataParallel(
                module,
                process_group=self.group,
                broadcast_buffers=False,
                find_unused_parameters=True,
            )

    def device(self, kind: str) -> torch.device:
        """This process's device of a kind. Raises UsageError for "cuda" where there is none."""
        if kind == "cpu":
            return torch.device("cpu")
        if self.local >= torch.cuda.device_count():
            raise UsageError(
                f"student.device is {kind!r}, and process {self.local} of this machine finds "
                f"{torch.cuda.device_count()} CUDA devices; start as many processes as there are, "
                'install a torch with CUDA, or set it to "cpu"'
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)


ALONE = Ranks()


@contextmanager
def speaking() -> Iterator[None]:
    """What goes wrong between the processes, as one sentence. Raises Apart.

    What goes wrong in the computing that they do meanwhile stays what it is.
    """
    try:
        yield
    except RuntimeError as error:
        if not between_processes(error):
            raise
        raise Apart(
            "another process of this run has ended or cannot be reached; its own last words say why "
            f"({_reason(error)})"
        ) from error


def between_processes(error: RuntimeError) -> bool:
    """Whether this is about another process, and not about what this one computes.

    NCCL and the store have types of their own; gloo raises the plain RuntimeError that everything in torch
    raises, and can be told by where it says that it was.
    """
    return isinstance(error, dist.DistError) or bool(_GLOO.search(str(error)))


@contextmanager
def joined(config: DistributedConfig) -> Iterator[Ranks]:
    """Meet the other processes that torchrun started, if it did.

    Raises UsageError for an environment that is not torchrun's, Apart if the others do not come
    within `config.join_s`.
    """
    world = _number("WORLD_SIZE", 1)
    if world == 1:
        yield ALONE
        return
    missing = [v for v in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(v)]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {world} and {', '.join(missing)} not set: start this with torchrun"
        )
    rank = _number("RANK", 0)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=config.join_s))
        # In its own group waiting may take longer: devices that one process asks can be slow.
        group = dist.new_group(timeout=timedelta(seconds=config.silence_s))
    except (RuntimeError, ValueError) as error:
        raise Apart(
            f"process {rank} of {world} did not meet the others at {place} within "
            f"{config.join_s:g} s ({_reason(error)}); are all of them started, and is MASTER_ADDR the "
            "first one's address?"
        ) from error
    try:
        yield Ranks(
            rank=rank,
            world=world,
            local=_number("LOCAL_RANK", 0),
            local_world=_number("LOCAL_WORLD_SIZE", 1),
            silence_s=config.silence_s,
            group=group,
        )
    finally:
        dist.destroy_process_group()


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UsageError(f"{variable} is {text!r} and must be a number: start this with torchrun")
    return int(text)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].strip().rstrip(".") if str(error) else type(error).__name__
