#!/usr/bin/env bash
# Installs packages with apt-get, as root: apt-install.sh PACKAGE... An index that cannot be fetched ends it only if the
# packages cannot be had then; another process's lock is waited for.
set -euo pipefail
fetch() {
    apt-get -o DPkg::Lock::Timeout=120 update -qq || true
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends "$@" >/dev/null
}
export -f fetch
exec bash "$(dirname "${BASH_SOURCE[0]}")/again.sh" bash -ec 'fetch "$@"' fetch "$@"
