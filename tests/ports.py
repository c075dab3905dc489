"""Ports for the processes of a test."""

from __future__ import annotations

import contextlib
import random
import socket

# below those that the system gives to whoever asks for any: one of these is still free when it is bound
PORTS = range(20000, 32768)


def free_port() -> int:
    numbers = random.SystemRandom()
    while True:
        port = numbers.choice(PORTS)
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
