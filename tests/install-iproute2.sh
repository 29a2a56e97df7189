#!/usr/bin/env bash
# Installs what the tests of partitions take a network apart with: with apt-get, where it is missing and may be used.
set -euo pipefail
if ! command -v ip >/dev/null; then
    if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
        echo "partitions are not tested: install iproute2, and run as root" >&2
        exit 0
    fi
    bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/apt-install.sh" iproute2
fi
