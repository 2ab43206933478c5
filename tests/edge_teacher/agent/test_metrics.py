"""What Prometheus reads, with its own parser, over HTTP."""

from __future__ import annotations

import http.client
import logging
import socket
import struct
import threading
import urllib.error
import urllib.request

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge_teacher.agent.metrics import CONTENT_TYPE, MetricsServer, render
from edge_teacher.contract.errors import UsageError
from edge_teacher.contract.messages import AnswerTimes, RuntimeInfo, Telemetry

WHOLE = Telemetry(
    uptime_s=12.5,
    rss_bytes=100 << 20,
    load_1min=0.25,
    temperature_c=49.1,
    queued=3,
    answered=41,
    refused=2,
    failed=1,
    images_held=70,
    temperatures_c={"cpu": 48.562, "tj": 49.1},
    power_w={"VDD_IN": 5.25},
    gpu_load=0.453,
    memory_available_bytes=5 << 30,
    memory_limit_bytes=1 << 30,
    throttled=True,
    throttling="gpu-throttle-alert",
    answer_times={"saliency": AnswerTimes(count=40, total_s=2.0, p50_ms=45.0, p99_ms=90.0)},
    runtime=RuntimeInfo(
        name="onnxruntime", version="1.31.1", provider="CPUExecutionProvider", threads=1
    ),
)
LABELS = {"device": 'jetson "7"\\\n'}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    """Every sample, without the labels that all have."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type != "unknown"
        for sample in family.samples:
            assert sample.labels["device"] == LABELS["device"]
            others = frozenset((k, v) for k, v in sample.labels.items() if k != "device")
            assert (sample.name, others) not in found
            found[sample.name, others] = sample.value
    return found


def test_every_number_is_there_under_its_unit() -> None:
    found = parsed(render(WHOLE, LABELS, connected=True))
    plain = {name: value for (name, labels), value in found.items() if not labels}
    assert plain == {
        "fedsa_connected": 1,
        "fedsa_uptime_seconds": 12.5,
        "fedsa_queued_requests": 3,
        "fedsa_answered_total": 41,
        "fedsa_refused_total": 2,
        "fedsa_failed_total": 1,
        "fedsa_images_held": 70,
        "fedsa_resident_memory_bytes": 100 << 20,
        "fedsa_memory_available_bytes": 5 << 30,
        "fedsa_memory_limit_bytes": 1 << 30,
        "fedsa_load1": 0.25,
        "fedsa_gpu_load_ratio": 0.453,
        "fedsa_throttled": 1,
    }
    labelled = {(name, *sorted(labels)): value for (name, labels), value in found.items() if labels}
    method = ("method", "saliency")
    assert labelled == {
        ("fedsa_temperature_celsius", ("zone", "cpu")): 48.562,
        ("fedsa_temperature_celsius", ("zone", "tj")): 49.1,
        ("fedsa_power_watts", ("rail", "VDD_IN")): 5.25,
        ("fedsa_answer_seconds", method, ("quantile", "0.5")): 0.045,
        ("fedsa_answer_seconds", method, ("quantile", "0.99")): 0.09,
        ("fedsa_answer_seconds_sum", method): 2.0,
        ("fedsa_answer_seconds_count", method): 40,
        (
            "fedsa_runtime_info",
            ("engine", "none"),
            ("name", "onnxruntime"),
            ("precision", "fp32"),
            ("provider", "CPUExecutionProvider"),
            ("version", "1.31.1"),
        ): 1,
    }


def test_an_engine_that_is_being_built_has_a_number_and_its_sentences_are_no_labels() -> None:
    building = RuntimeInfo(
        name="onnxruntime",
        version="1.31.1",
        provider="CPUExecutionProvider",
        threads=1,
        engine="building",
        engine_progress=0.4,
        detail="sentences",
        why_not={"tensorrt": "sentences"},
    )
    whole = msgspec.structs.replace(WHOLE, runtime=building)
    found = parsed(render(whole, LABELS, connected=True))
    assert found["fedsa_engine_built_ratio", frozenset()] == 0.4
    (about,) = [labels for name, labels in found if name == "fedsa_runtime_info"]
    assert ("engine", "building") in about
    assert "sentences" not in str(about)


def test_what_is_not_known_is_left_out_and_never_zero() -> None:
    bare = Telemetry(uptime_s=1, rss_bytes=1, load_1min=0)
    names = {name for name, _ in parsed(render(bare, LABELS, connected=False))}
    assert "fedsa_connected" in names
    assert not any(
        word in name for name in names for word in ("gpu", "temp", "power", "throttled", "limit")
    )


def test_it_is_served_on_loopback() -> None:
    server = MetricsServer(0, lambda: render(WHOLE, LABELS, connected=True))
    server.start()
    try:
        url = f"http://127.0.0.1:{server.port}"
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"] == CONTENT_TYPE
            assert parsed(answer.read().decode())
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/etc/passwd", timeout=10)
        assert server._server.server_address[0] == "127.0.0.1"
        # One that says nothing does not keep the next out for ever.
        with (
            socket.create_connection(("127.0.0.1", server.port)),
            urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer,
        ):
            assert answer.status == 200
        with pytest.raises(UsageError, match=f"the port {server.port} of 127.0.0.1 cannot be had"):
            MetricsServer(server.port, str)
    finally:
        server.stop()


def test_one_who_hangs_up_in_the_middle_is_a_line_of_the_log_and_no_traceback(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "edge_teacher.agent.metrics")
    asked, hung_up = threading.Event(), threading.Event()

    def text() -> str:
        asked.set()
        assert hung_up.wait(10)
        return "x" * 5_000_000

    server = MetricsServer(0, text)
    server.start()
    try:
        with socket.create_connection(("127.0.0.1", server.port)) as scraper:
            scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert asked.wait(10)
            # The kernel ends it at once, with a reset.
            scraper.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        hung_up.set()
        # One at a time: the next answer comes after the end of the first.
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as next_:
            assert next_.status == 200
    finally:
        server.stop()
    assert capfd.readouterr().err == ""
    assert "were not sent: ConnectionResetError" in caplog.text


def test_what_goes_wrong_here_is_an_error_of_the_log(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def text() -> str:
        raise ZeroDivisionError("no second has passed")

    server = MetricsServer(0, text)
    server.start()
    try:
        with pytest.raises(http.client.RemoteDisconnected):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10)
    finally:
        server.stop()
    assert capfd.readouterr().err == ""
    (said,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert said.message == "the metrics could not be told"
    assert "no second has passed" in caplog.text
