"""The process around an agent: signals, systemd, the log, the connection, metrics, and reloading."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, closing

from edge_teacher import __version__
from edge_teacher.agent import logs, metrics, systemd
from edge_teacher.agent.connecting import Connecting
from edge_teacher.agent.pulse import Pulse
from edge_teacher.agent.service import Agent, AgentConfig
from edge_teacher.agent.settings import Settings, Source
from edge_teacher.agent.signals import Signals
from edge_teacher.contract.errors import FedsaError, UsageError
from edge_teacher.files import locked, sweep
from edge_teacher.keys import read_public

log = logging.getLogger(__name__)


def run(source: Source) -> int:
    """Serve until SIGTERM or SIGINT; the exit code.

    Raises what stands in the way before anything is served: UsageError, CheckFailed. With JSON logs that is
    a line of the log instead, so that every line is JSON.
    """
    settings = source.read()
    with ExitStack() as ends:
        notify = ends.enter_context(closing(systemd.notifier()))
        systemd.forget(os.environ)
        fields = {"device": settings.device}
        ends.enter_context(logs.logging_to(settings.log, settings.log_level, fields=fields))
        signals = ends.enter_context(Signals())
        try:
            ends.enter_context(locked(settings.state, "agent"))
            sweep(settings.state)
            Daemon(source, settings, notify).run(signals)
        except FedsaError as error:
            notify.stopping(str(error))
            if settings.log != "json":
                raise
            log.critical("%s", error)
            return error.exit_code
    return 0


class Daemon:
    """One agent and what stands around it."""

    def __init__(self, source: Source, settings: Settings, notify: systemd.Notifier) -> None:
        self._source = source
        self._settings = settings
        self._notify = notify
        # Known now, where somebody may be watching; later, it may be a file that is being replaced.
        settings.address.ssl_context()
        self._agent = Agent(_config(settings))
        self._connecting = Connecting(self._agent, settings.address)
        self._pulse = Pulse(notify, self._stuck, self._status)

    def run(self, signals: Signals) -> None:
        """Until a signal says to stop. READY is said once the teacher is loaded, whether or not there is a
        network: a device that starts without one is not broken, and its status says what it waits for."""
        with ExitStack() as ends:
            port = self._settings.metrics_port
            if port is not None:
                served = metrics.MetricsServer(port, self._metrics)
                served.start()
                ends.callback(served.stop)
                log.info("metrics are at http://127.0.0.1:%d/metrics", served.port)
            self._say_what_is_missing()
            self._connecting.start()
            self._notify.ready(self._status())
            self._pulse.start()
            ends.callback(self._pulse.stop)
            while signals.wait() == "reload":
                self._reload()
            self._notify.stopping("answering what is begun")
            self._connecting.stop()
            self._agent.stop()

    def _say_what_is_missing(self) -> None:
        """Once, and by reason: what telemetry this machine cannot give."""
        reasons: dict[str, list[str]] = {}
        for name, why in self._agent.telemetry().unavailable.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            log.info("the telemetry has no %s: %s", ", ".join(names), why)

    def _reload(self) -> None:
        self._notify.reloading()
        log.info("reading the configuration again")
        try:
            new = self._source.read()
            config = _config(new)
            self._agent.check_limits(config)
            self._connecting.renew_certificates()
            self._take(new, config)
        except UsageError as error:
            log.error("the configuration stays as it was: %s", error)  # noqa: TRY400  # no traceback
        except Exception:
            # Whatever it is: a device that serves goes on serving, and systemd waits for READY.
            log.exception("the configuration could not be read again; the agent goes on as it was")
        self._notify.ready(self._status())

    def _take(self, new: Settings, config: AgentConfig) -> None:
        live, later = self._settings.changed(new)
        self._agent.reconfigure(config)
        logs.set_level(new.log_level)
        self._settings = self._settings.with_live_of(new)
        log.info("taken: %s", ", ".join(sorted(live)) or "nothing is new but what files hold")
        if later:
            log.warning("restart this agent to take %s too", ", ".join(sorted(later)))

    def _stuck(self) -> str:
        return self._connecting.stuck() or self._agent.stuck(self._settings.stuck_after_s)

    def _status(self) -> str:
        teacher, problem = self._agent.teacher, self._connecting.problem
        what = f"{teacher.name} {teacher.version}"
        if problem:
            return f"{what} is loaded; waits for {self._settings.address}: {problem}"
        answered = self._agent.answered
        return f"serves {what} at {self._settings.address}; {answered} answered"

    def _metrics(self) -> str:
        labels = {
            "device": self._settings.device,
            "teacher": self._agent.teacher.name,
            "software": f"edge-teacher {__version__}",
        }
        connected = not self._connecting.problem
        return metrics.render(self._agent.telemetry(), labels, connected=connected)


def _config(settings: Settings) -> AgentConfig:
    """Raises UsageError for a key file that cannot be used."""
    return AgentConfig(
        device=settings.device,
        bundle=settings.bundle,
        owners=[read_public(path) for path in settings.owner_keys],
        coordinator_keys=[read_public(path) for path in settings.coordinator_keys],
        state=settings.state,
        allowed=settings.allow,
        threads=settings.threads,
        telemetry_s=settings.telemetry_s,
        limits=settings.limits,
        memory_bytes=settings.memory_bytes,
        tegrastats=settings.tegrastats,
    )
