from __future__ import annotations

from pathlib import Path

import pytest

from edge_teacher.agent.ceiling import MemoryCeiling, default_ceiling_bytes
from edge_teacher.contract.errors import Busy, TooLarge, UsageError
from edge_teacher.contract.limits import MIB, UPLOAD_BYTES, Limits


class Process:
    """How much it has, as the kernel would say."""

    def __init__(self, resident_mib: int, available_mib: int | None = None) -> None:
        self.resident_mib = resident_mib
        self.available_mib = available_mib
        self.freed_mib = 0
        """What it no longer uses, and the kernel still counts."""
        self.trims = 0

    def ceiling(self, mib: int) -> MemoryCeiling:
        return MemoryCeiling(
            mib * MIB,
            resident=lambda: self.resident_mib * MIB,
            available=lambda: None if self.available_mib is None else self.available_mib * MIB,
            trim=self._trim,
        )

    def _trim(self) -> None:
        self.trims += 1
        self.resident_mib -= self.freed_mib
        self.freed_mib = 0


class TestDefault:
    def write(self, root: Path, files: dict[str, str]) -> Path:
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return root

    MEMINFO = "MemTotal:  8000000 kB\nMemAvailable: 5000000 kB\n"

    def test_nine_tenths_of_the_machine(self, tmp_path: Path) -> None:
        root = self.write(tmp_path, {"proc/meminfo": self.MEMINFO})
        assert default_ceiling_bytes(root) == 8_000_000 * 1024 * 9 // 10

    @pytest.mark.parametrize("name", ["memory.max", "memory.high"])
    def test_or_of_the_control_group_or_one_above_it(self, tmp_path: Path, name: str) -> None:
        root = self.write(
            tmp_path,
            {
                "proc/meminfo": self.MEMINFO,
                "proc/self/cgroup": "0::/system.slice/edge-teacher.service\n",
                f"sys/fs/cgroup/system.slice/{name}": "1000000000\n",
                f"sys/fs/cgroup/system.slice/edge-teacher.service/{name}": "max\n",
            },
        )
        assert default_ceiling_bytes(root) == 900_000_000

    def test_or_of_one_of_version_1(self, tmp_path: Path) -> None:
        root = self.write(
            tmp_path,
            {
                "proc/meminfo": self.MEMINFO,
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/a\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes": "500000000\n",
            },
        )
        assert default_ceiling_bytes(root) == 450_000_000

    def test_this_machine_s_is_some(self) -> None:
        assert default_ceiling_bytes() > 64 * MIB


class TestCeiling:
    def test_what_is_reserved_is_not_promised_twice(self) -> None:
        memory = Process(20).ceiling(100)
        release = memory.reserve(50 * MIB)
        with pytest.raises(Busy, match="31,457,280 are left of 104,857,600") as refused:
            memory.reserve(40 * MIB)
        assert refused.value.retry_after_s
        release()
        release()  # once counts once
        memory.reserve(80 * MIB)()
        assert memory.reserved_bytes == 0

    def test_what_never_fits_is_too_large(self) -> None:
        with pytest.raises(TooLarge, match="has 83,886,080 for all questions"):
            Process(20).ceiling(100).reserve(81 * MIB)

    def test_a_ceiling_that_the_teacher_fills_is_told_at_once(self) -> None:
        with pytest.raises(UsageError, match="raise it"):
            Process(95).ceiling(100)

    def test_memory_that_was_freed_is_given_back_before_anybody_is_refused(self) -> None:
        process = Process(20)
        memory = process.ceiling(100)
        process.resident_mib, process.freed_mib = 90, 60
        memory.reserve(50 * MIB)()
        assert process.trims == 1

    def test_the_machine_s_memory_is_everybody_s(self) -> None:
        process = Process(20, available_mib=1000)
        memory = process.ceiling(100)
        memory.reserve(50 * MIB)()
        process.available_mib = 40  # others have come
        with pytest.raises(Busy):
            memory.reserve(50 * MIB)

    def test_what_a_larger_step_takes_is_foreseen_from_smaller_ones(self) -> None:
        process = Process(20)
        memory = process.ceiling(100)
        assert memory.fits("net", 64)  # nothing is known yet
        # 10 MiB once, then 2 for each further image, of which half comes with the second step.
        for rows, grown in ((1, 10), (1, 0), (2, 1), (2, 1), (4, 2), (4, 2), (4, 0), (4, 0)):
            before = memory.before_step("net", rows)
            assert before is not None
            process.resident_mib += grown
            memory.after_step("net", rows, before)
        assert memory.before_step("net", 4) is None  # nothing to learn any more
        assert memory.before_step("net", 8) is not None
        assert memory.fits("net", 5)
        # The runtime has 16 MiB, and may have 20 of 80.
        assert not memory.fits("net", 6)
        assert memory.fits("another", 64)

    def test_an_image_of_a_size_that_was_never_computed_is_tried_only_where_it_is_sure_to_fit(
        self,
    ) -> None:
        process = Process(20)
        memory = process.ceiling(100)
        with pytest.raises(TooLarge, match=r"800 x 800 would take about 23,040,000 .* 20,971,520"):
            memory.require_front("net", (800, 800))  # the runtime may have 20 MiB of 80
        memory.require_front("net", (700, 700))
        process.resident_mib = 90
        with pytest.raises(Busy, match="10,485,760 are left of 104,857,600") as refused:
            memory.require_front("net", (700, 700))
        assert refused.value.retry_after_s
        memory.require_front("net", (100, 100))
        # What it has taken for the first it does not take again.
        memory.after_step("net", 1, memory.before_step("net", 1))
        memory.require_front("net", (700, 700))


@pytest.mark.parametrize("mib", [16, 64, 256, 4096])
def test_limits_that_fit_the_memory_fit_it_together(mib: int) -> None:
    limits = Limits().within(mib * MIB)
    together = (
        limits.image_store_bytes
        + limits.max_outgoing_bytes
        + limits.max_answer_bytes
        + limits.answer_cache_bytes
        + limits.max_queued_requests * UPLOAD_BYTES
    )
    assert together <= mib * MIB
    assert limits.max_block_bytes <= limits.image_store_bytes
    if mib == 4096:
        assert limits == Limits()
