"""What tests on a real GPU measured, collected over a run."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_teacher.runtime.trial import Trial

FILE = Path("gpu-verdict.json")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One teacher in one precision on one runtime."""

    teacher: str
    trial: Trial
    cpu_ms_per_image: tuple[float, ...]
    features_alone: float | None = None
    """Their time over that of everything."""
    from_cache_s: float | None = None
    """Until the engine answered at the next start."""


class Verdict:
    def __init__(self) -> None:
        self.device = ""
        self.rows: list[Row] = []

    @property
    def lines(self) -> list[str]:
        if not self.rows:
            return []
        return [self.device, *(self._line(row) for row in self.rows)]

    def write(self) -> Path:
        content = {"device": self.device, "rows": self.rows}
        FILE.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
        return FILE.absolute()

    @staticmethod
    def _line(row: Row) -> str:
        trial = row.trial
        parts = [f"{row.teacher} on {trial.label}: {trial.state}"]
        if trial.reason:
            parts.append(trial.reason)
        if trial.build_s is not None:
            parts.append(f"built in {trial.build_s:.1f} s")
        if row.from_cache_s is not None:
            parts.append(f"from the cache in {row.from_cache_s:.2f} s")
        if trial.ms_per_image:
            one, many = trial.ms_per_image
            cpu_one, cpu_many = row.cpu_ms_per_image
            parts.append(f"{one:.3f} ms alone (CPU {cpu_one:.3f})")
            parts.append(f"{many:.4f} ms per image in 32 (CPU {cpu_many:.4f})")
        if trial.largest_difference is not None:
            parts.append(f"off by {trial.largest_difference:.1e}")
        if row.features_alone is not None:
            parts.append(f"features alone take {row.features_alone:.2f} of everything")
        return "; ".join(parts)


VERDICT = Verdict()
