"""`python launch.py FLAGS...`: SGLang's HTTP server, without the 10 GiB it wants free beside pools of a few MiB."""

from __future__ import annotations

import sys

from sglang.srt.mem_cache.pool_host import base

base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0  # its processes import this module too

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
