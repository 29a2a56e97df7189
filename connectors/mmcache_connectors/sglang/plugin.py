"""What SGLang's plugin loader calls in each of its processes (entry point group `sglang.srt.plugins`).

Installed with mmcache, so it runs in engines that never asked for it: there it reads the environment and does no more.
Imports nothing until a setting is found.
"""

from __future__ import annotations

import os
from typing import Final

PREFIX: Final = "MMCACHE_SGLANG_EMBEDDINGS_"
ATTACH: Final = "MMCACHE_SGLANG_ATTACH"
LEND: Final = "MMCACHE_SGLANG_LEND"


def activate() -> None:
    """Make mmcache the store of SGLang's global encoder cache, if any variable of the environment begins with PREFIX;
    put the hooks in that the HiCache backend needs from a process's start, if ATTACH is set to anything but 0; and have
    host pools made of memory that a cache on this host may map, if LEND is.

    What they say is looked at where an encoder is made, as SGLang only logs an error of a plugin. Source: load_plugins
    in SGLang 0.5.23.
    """
    if os.environ.get(ATTACH, "0") not in ("", "0"):
        from mmcache_connectors.sglang import hooks

        hooks.install()
    if os.environ.get(LEND, "0") not in ("", "0"):
        from mmcache_connectors.sglang import lending

        lending.register()
    if any(name.startswith(PREFIX) for name in os.environ):
        from mmcache_connectors.sglang import encoder_processes

        encoder_processes.register()
