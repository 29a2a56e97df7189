#!/usr/bin/env bash
# Installs the Redis that the tests of membership start: with apt-get, where it is missing and may be used.
set -euo pipefail
if ! command -v redis-server >/dev/null; then
    if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
        echo "membership by Redis is not tested: install redis-server 6 or newer" >&2
        exit 0
    fi
    # The package would start a server of its own; the tests start theirs.
    RUNLEVEL=1 bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/apt-install.sh" redis-server
fi
