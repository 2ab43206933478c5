"""An engine for all outputs of a graph, and smaller ones for those asked for alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_teacher.contract.errors import CheckFailed, RuntimeFailed
from edge_teacher.contract.messages import RuntimeInfo
from edge_teacher.runtime.tensorrt.session import TensorRTSession
from edge_teacher.runtime.trial import ms_per_image, require_agreement
from edge_teacher.runtime.worker import Worker

log = logging.getLogger(__name__)

MAX_PARTS = 4
"""Engines of fewer outputs: each has the weights and its buffers once more."""
PART_WORTH = 0.8
"""A part that takes more than this share of the whole engine's time is not worth its memory."""


class EngineFamily:
    """Features alone do not pay for saliency: their engine is built when they are first asked for alone.

    Until it is there, proved and measured, the whole engine answers.
    """

    def __init__(
        self,
        whole: TensorRTSession,
        build_part: Callable[[tuple[str, ...]], TensorRTSession],
        images: NDArray[np.uint8],
        worker: Worker,
        name: str,
    ) -> None:
        """`build_part` takes sorted outputs and raises CheckFailed; `images` are what a part is proved on."""
        self._whole = whole
        self._build_part = build_part
        self._images = images
        self._worker = worker
        self._name = name
        self._parts: dict[frozenset[str], TensorRTSession | None] = {}
        self._lock = threading.Lock()

    @property
    def info(self) -> RuntimeInfo:
        return self._whole.info

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._whole.outputs

    def fits(self, images: NDArray[np.uint8]) -> bool:
        return self._whole.fits(images)

    def run(
        self, images: NDArray[np.uint8], outputs: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        wanted = frozenset(outputs)
        part = self._parts.get(wanted)
        if part is None:
            if wanted < set(self.outputs):
                self._order(wanted)
            return self._whole.run(images, outputs)
        return part.run(images, outputs)

    def close(self) -> None:
        with self._lock:
            parts = [part for part in self._parts.values() if part is not None]
            self._parts.clear()
        for session in (*parts, self._whole):
            session.close()

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _order(self, wanted: frozenset[str]) -> None:
        with self._lock:
            if wanted in self._parts or len(self._parts) >= MAX_PARTS:
                return
            self._parts[wanted] = None
        self._worker.submit(lambda: self._add(wanted))

    def _add(self, wanted: frozenset[str]) -> None:
        outputs = tuple(sorted(wanted))
        alone = ", ".join(outputs)
        try:
            part = self._build_part(outputs)
        except CheckFailed as error:
            log.warning("%s: %s alone go on with the whole engine: %s", self._name, alone, error)
            return
        try:
            share = self._proved(part, outputs)
        except (CheckFailed, RuntimeFailed) as error:
            log.warning("%s: %s alone go on with the whole engine: %s", self._name, alone, error)
            part.close()
            return
        log.info("%s: %s alone take %.2f of the whole engine's time", self._name, alone, share)
        with self._lock:
            if share <= PART_WORTH and wanted in self._parts:
                self._parts[wanted] = part
                return
        part.close()

    def _proved(self, part: TensorRTSession, outputs: tuple[str, ...]) -> float:
        """Its time over the whole engine's for as many images. Raises CheckFailed if it answers otherwise."""
        wanted = self._whole.run(self._images, outputs)
        require_agreement(part, wanted, self._images, self.info.precision)
        return ms_per_image(part, self._images)[-1] / ms_per_image(self._whole, self._images)[-1]
