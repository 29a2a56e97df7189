"""What mmcache logged in a test's own thread. Other tests of this process may have left threads that still log, and
tasks that asyncio logs of here."""

from __future__ import annotations

import logging
import threading

import pytest


def heard(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Of the calling thread, in order."""
    own = (record for record in caplog.records if record.thread == threading.get_ident())
    return [record for record in own if record.name.startswith("mmcache")]
