"""What a test's own thread logged. Threads that other tests began in this process may still say something."""

from __future__ import annotations

import logging
import threading

import pytest


def heard(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Of the calling thread, in order."""
    return [record for record in caplog.records if record.thread == threading.get_ident()]
