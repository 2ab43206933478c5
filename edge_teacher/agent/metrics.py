"""The telemetry as Prometheus reads it (text format 0.0.4), on loopback only."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer

from edge_teacher.contract.errors import UsageError
from edge_teacher.contract.messages import Telemetry

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_PATIENCE_S = 5.0
"""A client that says nothing for so long is hung up on: there is one at a time."""

Labels = Mapping[str, str]


def render(telemetry: Telemetry, labels: Labels, *, connected: bool) -> str:
    """Every number of `telemetry` that this device has; what it does not tell is left out.

    `labels` go with each, the device's name above all. Names end in their unit, counters in `_total`.
    """
    return "\n".join(_lines(telemetry, labels, connected)) + "\n"


def _lines(t: Telemetry, labels: Labels, connected: bool) -> Iterator[str]:
    def one(name: str, kind: str, told: str, value: float | None) -> Iterator[str]:
        if value is not None:
            yield from _family(name, kind, told, [(labels, value)])

    def each(name: str, told: str, label: str, values: Mapping[str, float]) -> Iterator[str]:
        samples = [({**labels, label: key}, value) for key, value in sorted(values.items())]
        yield from _family(name, "gauge", told, samples)

    if t.runtime is not None:
        about = {
            "name": t.runtime.name,
            "version": t.runtime.version,
            "provider": t.runtime.provider,
            "precision": t.runtime.precision,
            "engine": t.runtime.engine,
        }
        told = "What executes the teacher."
        yield from _family("fedsa_runtime_info", "gauge", told, [({**labels, **about}, 1)])
        building = t.runtime.engine == "building"
        built = t.runtime.engine_progress if building else None
        yield from one("fedsa_engine_built_ratio", "gauge", "Of an engine being built.", built)
    yield from one("fedsa_connected", "gauge", "Whether a broker is connected.", float(connected))
    yield from one("fedsa_uptime_seconds", "gauge", "Since the agent's start.", t.uptime_s)
    yield from one("fedsa_queued_requests", "gauge", "Requests that wait.", t.queued)
    yield from one("fedsa_answered_total", "counter", "Requests answered.", t.answered)
    yield from one("fedsa_refused_total", "counter", "Requests refused.", t.refused)
    yield from one("fedsa_failed_total", "counter", "Requests that failed here.", t.failed)
    yield from one("fedsa_images_held", "gauge", "Images in the store.", t.images_held)
    yield from _times(t, labels)
    yield from one("fedsa_resident_memory_bytes", "gauge", "Memory of the agent.", t.rss_bytes)
    yield from one(
        "fedsa_memory_available_bytes",
        "gauge",
        "Memory the kernel could still give.",
        t.memory_available_bytes,
    )
    yield from one(
        "fedsa_memory_limit_bytes", "gauge", "Of the control group.", t.memory_limit_bytes
    )
    yield from one("fedsa_load1", "gauge", "Load average of one minute.", t.load_1min)
    yield from each("fedsa_temperature_celsius", "By thermal zone.", "zone", t.temperatures_c)
    yield from each("fedsa_power_watts", "By power rail.", "rail", t.power_w)
    yield from one("fedsa_gpu_load_ratio", "gauge", "Load of the GPU, 0 to 1.", t.gpu_load)
    throttled = None if t.throttled is None else float(t.throttled)
    yield from one("fedsa_throttled", "gauge", "Whether heat or supply slows it down.", throttled)


def _times(t: Telemetry, labels: Labels) -> Iterator[str]:
    name = "fedsa_answer_seconds"
    if not t.answer_times:
        return
    yield f"# HELP {name} From a request's arrival to its answer; quantiles of the last minutes."
    yield f"# TYPE {name} summary"
    for method, times in sorted(t.answer_times.items()):
        with_method = {**labels, "method": method}
        for quantile, ms in (("0.5", times.p50_ms), ("0.99", times.p99_ms)):
            if ms is not None:
                yield _sample(name, {**with_method, "quantile": quantile}, ms / 1e3)
        yield _sample(f"{name}_sum", with_method, times.total_s)
        yield _sample(f"{name}_count", with_method, times.count)


def _family(
    name: str, kind: str, told: str, samples: Sequence[tuple[Labels, float]]
) -> Iterator[str]:
    if samples:
        yield f"# HELP {name} {told}"
        yield f"# TYPE {name} {kind}"
        for labels, value in samples:
            yield _sample(name, labels, value)


def _sample(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class _QuietServer(HTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """The library's prints where only lines of the log belong."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):  # whoever hangs up in the middle is no fault of this device
            log.debug("the metrics asked for by %s were not sent: %r", client_address, error)
        else:
            log.error("the metrics could not be told", exc_info=error)


class MetricsServer:
    """GET /metrics on 127.0.0.1, one request at a time, on one thread: nothing piles up."""

    def __init__(self, port: int, text: Callable[[], str]) -> None:
        """`port` 0 takes any. Raises UsageError where it cannot be had."""

        class Handler(BaseHTTPRequestHandler):
            timeout = _PATIENCE_S
            server_version = "edge-teacher"
            sys_version = ""

            def do_GET(self) -> None:
                if self.path.split("?")[0] != "/metrics":
                    self.send_error(404, "there is only /metrics here")
                    return
                body = text().encode()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, form: str, *arguments: object) -> None:
                log.debug(form, *arguments)

        try:
            self._server = _QuietServer(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UsageError(
                f"the port {port} of 127.0.0.1 cannot be had for metrics: {error.strerror}; choose another "
                "with --metrics-port"
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )

    @property
    def port(self) -> int:
        return self._server.server_port

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
