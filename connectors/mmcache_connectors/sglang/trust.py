"""Whether this process may still name values by what it knows of them. Once it may not, it never may again.

SGLang can replace weights while it runs, and meet media nobody can identify: from then on a page's name would say
less than decides its bytes. Hooks in the scheduler process say so here; the backend asks before each call.
"""

from __future__ import annotations

import logging
import threading

log = logging.getLogger("mmcache.sglang")


class Trust:
    """`reason` is why nothing may be stored or read any more; None while all is well. Thread-safe."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._lock = threading.Lock()

    def end(self, reason: str) -> None:
        """Stop for good; said once, in the log."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
        log.error("mmcache: %s; this engine stores and reads nothing from now on", reason)


TRUST = Trust()
