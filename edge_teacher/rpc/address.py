"""Where the broker is, and what to show it: `mqtt://host:port` or `mqtts://host:port`."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from edge_teacher.contract.errors import UsageError

_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, kw_only=True)
class BrokerAddress:
    """A broker. With `mqtts`, `ca` verifies it; `certificate` and `key` prove who is connecting."""

    host: str
    port: int
    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    def ssl_context(self) -> ssl.SSLContext | None:
        """None without TLS. Raises UsageError for a file that cannot be used."""
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
            if self.certificate is not None:
                # Without a password a service would wait at a prompt for an encrypted key.
                context.load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:  # ssl.SSLError is one
            files = [str(f) for f in (self.ca, self.certificate, self.key) if f]
            raise UsageError(f"the TLS files {', '.join(files)} cannot be used: {error}") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


def parse_broker(
    url: str,
    *,
    ca: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> BrokerAddress:
    """Raises UsageError for anything but mqtt[s]://host[:port], or TLS files that would not be used."""
    shown = re.sub(r"//.*@", "//…@", url, flags=re.DOTALL)  # what stands there may be a password
    wanted = f"the broker {shown!r} is no address: write mqtt://HOST:PORT or mqtts://HOST:PORT"
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")  # what the look-up of a name begins with
    except ValueError as error:  # UnicodeError is one
        raise UsageError(wanted) from error
    more = parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc
    if parts.scheme not in _PORTS or not parts.hostname or port == 0 or more:
        raise UsageError(wanted)
    if parts.scheme == "mqtt" and (ca or certificate or key):
        raise UsageError(
            f"the broker {shown!r} is asked without TLS, so a certificate authority, a certificate "
            "or a key would not be used: write mqtts://, or leave them out"
        )
    if key is not None and certificate is None:
        raise UsageError(f"the key {key} comes without its certificate: give both")
    return BrokerAddress(
        host=parts.hostname,
        port=port or _PORTS[parts.scheme],
        tls=parts.scheme == "mqtts",
        ca=ca,
        certificate=certificate,
        key=key,
    )
