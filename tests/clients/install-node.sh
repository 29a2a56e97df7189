#!/usr/bin/env bash
# Installs what the Node client's tests need: Node itself, with apt-get where it is missing, and the client's packages
# into clients/node/node_modules. A run that finds everything there does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../clients/node"
if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
    if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
        echo "the Node client is not tested: install Node 18 or newer, with npm" >&2
        exit 0
    fi
    bash ../../scripts/apt-install.sh nodejs npm
fi
stamp=node_modules/.stamp
if [ ! -e "$stamp" ] || ! cmp -s package.json "$stamp"; then
    echo "installing the Node client's packages into clients/node/node_modules"
    bash ../../scripts/again.sh npm install --no-audit --no-fund --no-progress --loglevel=error
    cp package.json "$stamp"
fi
