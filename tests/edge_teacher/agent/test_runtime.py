"""An agent on a device with a (scripted) GPU: what its card says, and what its students run on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edge_teacher.agent import service
from edge_teacher.agent.service import Agent, AgentConfig
from edge_teacher.contract import frame
from edge_teacher.contract.images import image_block_id
from edge_teacher.contract.messages import (
    Answered,
    Card,
    FeaturesQuery,
    PredictQuery,
    PutImages,
    Received,
    SaliencyQuery,
    StudentCommand,
    StudentOffer,
    StudentOffered,
    StudentStatus,
)
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.memory import MemoryBroker
from edge_teacher.rpc.transport import Message
from edge_teacher.runtime import LiveSession, Model, live, open_session
from edge_teacher.runtime.machine import Machine
from edge_teacher.runtime.session import Session
from tests.edge_teacher.nets import (
    COORDINATOR,
    OWNER,
    TASK,
    pictures,
    student,
    student_answers,
    teacher_answers,
    teacher_bundle,
)
from tests.edge_teacher.runtime.fake_gpu import FakeDriver, FakeTensorRT, fake_cuda
from tests.edge_teacher.runtime.same import same

DEVICE = "orin-1"
IMAGES = pictures(5)
BLOCK = image_block_id(IMAGES)
WAIT_S = 20


class Device:
    """An agent, a coordinator beside it, and every card that was published."""

    def __init__(self, folder: Path, trt: FakeTensorRT) -> None:
        self.trt, self.driver = trt, FakeDriver()
        self.cards: list[Card] = []
        self._heard = threading.Condition()
        bundle = folder / "teacher.fedsa"
        bundle.write_bytes(teacher_bundle())
        self.agent = Agent(
            AgentConfig(
                device=DEVICE,
                bundle=bundle,
                owners=[OWNER.public_key()],
                coordinator_keys=[COORDINATOR.public_key()],
                state=folder / "state",
            )
        )
        broker = MemoryBroker()
        listener = broker.connect()
        listener.subscribe(f"fedsa/v1/{DEVICE}/card", self._note)
        self.caller = Caller(listener, "ada", tick_s=0.02)
        self.agent.start(broker.connect(self.agent.will()))

    def _note(self, message: Message) -> None:
        with self._heard:
            self.cards.append(frame.decode(message.payload, Card)[0])
            self._heard.notify_all()

    def card(self, wanted: Callable[[Card], bool]) -> Card:
        """The newest card, once it is as wanted."""
        with self._heard:
            assert self._heard.wait_for(lambda: bool(self.cards) and wanted(self.cards[-1]), WAIT_S)
            return self.cards[-1]

    def call(self, method: str, body: object, answer: type, **tensors: np.ndarray):  # type: ignore[no-untyped-def]
        return self.caller.call(DEVICE, method, body, tensors, answer=answer, timeout_s=WAIT_S)  # type: ignore[arg-type]


@pytest.fixture
def trt() -> FakeTensorRT:
    return FakeTensorRT()


@pytest.fixture
def device(tmp_path: Path, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    driver = FakeDriver()

    def opened(model: Model, **options: object) -> LiveSession:
        machine = Machine(fake_cuda(driver), trt, onnxruntime, {})
        return open_session(model, **options, find=lambda: machine)  # type: ignore[arg-type]

    def scripted(session: Session, _images: np.ndarray) -> tuple[float, float]:
        return (1.0, 1.0) if session.info.name == "tensorrt" else (9.0, 9.0)

    monkeypatch.setattr(service, "open_session", opened)
    monkeypatch.setattr(live, "ms_per_image", scripted)
    found = Device(tmp_path, trt)
    found.driver = driver
    yield found
    if trt.gate is not None:
        trt.gate.set()
    found.caller.close()
    found.agent.stop()


class TestWhileAnEngineIsBuilt:
    @pytest.fixture
    def trt(self) -> FakeTensorRT:
        found = FakeTensorRT()
        found.gate = threading.Event()
        return found

    def test_the_cpu_answers_and_the_card_follows(self, device: Device) -> None:
        building = device.card(lambda card: card.runtime.engine == "building")
        assert building.runtime.provider == "CPUExecutionProvider"
        self.ask(device)
        assert device.trt.gate is not None
        device.trt.gate.set()
        ready = device.card(lambda card: card.runtime.engine == "ready").runtime
        assert (ready.name, ready.provider, ready.precision) == ("tensorrt", "Orin", "fp32")
        assert ready.ms_per_image == (1.0, 1.0)
        assert "slower" in ready.why_not["onnxruntime CPUExecutionProvider fp32"]
        told = device.agent.telemetry().runtime
        assert told is not None
        assert (told.engine, told.why_not) == ("ready", {})
        self.ask(device)

    def test_what_was_measured_of_the_cpu_is_forgotten_and_the_limits_follow(
        self, device: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LiveSession, "grown_bytes", 1 << 50)  # a GPU that takes everything
        device.card(lambda card: card.runtime.engine == "building")
        self.ask(device)
        sizes = device.agent._engine.sizes
        assert sizes._kinds
        learnt = dict(sizes._kinds)
        assert device.trt.gate is not None
        device.trt.gate.set()
        card = device.card(lambda card: card.runtime.engine == "ready")
        assert card.limits.max_answer_bytes < 8 << 20
        self.ask(device)
        assert all(sizes._kinds.get(kind) is not known for kind, known in learnt.items())

    def ask(self, device: Device) -> None:
        features, saliency = teacher_answers(IMAGES)
        device.call(
            "put_images",
            PutImages(block=BLOCK, shape=IMAGES.shape),
            Received,
            data=IMAGES.reshape(-1),
        )
        _, maps = device.call("saliency", SaliencyQuery(block=BLOCK, dtype="f32"), Answered)
        same(maps["saliency"], saliency)
        _, found = device.call("features", FeaturesQuery(block=BLOCK, dtype="f32"), Answered)
        same(found["features"], features)


class TestWhenTheGpuFails:
    def test_queries_are_answered_and_the_card_says_why_it_is_the_cpu(self, device: Device) -> None:
        device.card(lambda card: card.runtime.engine == "ready")
        device.trt.executes = False
        TestWhileAnEngineIsBuilt().ask(device)
        failed = device.card(lambda card: card.runtime.engine == "failed").runtime
        assert failed.provider == "CPUExecutionProvider"
        assert "an illegal memory access" in failed.detail


class TestStudents:
    def test_a_student_goes_over_to_the_gpu_s_dialect_once_its_canary_passed_there(
        self, device: Device
    ) -> None:
        logits = dict.fromkeys(("fp32", "int8_cpu", "int8_tensorrt"), "canary.logits.npy")
        made = student(graphs=dict.fromkeys(logits, "student.onnx"), canary_logits=logits)
        status = self.activate(device, made)
        assert status.runtime_file == "student.onnx"
        TestWhileAnEngineIsBuilt().ask(device)
        active = device.agent._students.active(TASK)
        card = device.card(lambda _: active.session.info.engine == "ready")
        assert active.session.info.precision == "int8_tensorrt"
        assert set(active.canary.proofs) == {"int8_cpu", "int8_tensorrt", "fp32"}
        assert card.students[0].canary_agreement == 1
        _, found = device.call("predict", PredictQuery(task=TASK, block=BLOCK), Answered)
        same(found["logits"], student_answers(IMAGES), 1e-5)

    def test_one_whose_canary_fails_on_the_gpu_stays_on_the_cpu(self, device: Device) -> None:
        device.trt.factor = lambda graph: -1.0 if b"colour" in graph else 1.0
        self.activate(device, student())
        active = device.agent._students.active(TASK)
        device.card(lambda _: active.session.info.engine == "failed")
        assert active.session.info.provider == "CPUExecutionProvider"
        assert "of its canary batch as at export" in active.session.info.detail or (
            "differs from the CPU's" in active.session.info.detail
        )

    def activate(self, device: Device, made: tuple[object, bytes]) -> StudentStatus:
        _, bundle = made
        offer = StudentOffer(
            task=TASK,
            version=1,
            digest=hashlib.sha256(bundle).hexdigest(),
            total_bytes=len(bundle),
        )
        device.call("student.offer", offer, StudentOffered, data=np.frombuffer(bundle, np.uint8))
        command = StudentCommand(task=TASK, version=1)
        found, _ = device.call("student.activate", command, StudentStatus)
        assert found.state == "active"
        return found  # type: ignore[no-any-return]


def test_a_stopped_agent_has_given_the_gpu_s_memory_back(device: Device) -> None:
    device.card(lambda card: card.runtime.engine == "ready")
    assert device.driver.held
    device.agent.stop()
    assert device.driver.held == {}
    assert device.driver.streams == 0
