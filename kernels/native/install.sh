#!/usr/bin/env bash
# Installs mmcache-native into the environment of the Python given, and with apt-get what it is built with where that is
# missing. Where it cannot be built, that is said: mmcache works without it.
set -euo pipefail
python=$1
cd "$(dirname "${BASH_SOURCE[0]}")"
buildable() {
    printf '#include <Python.h>\n#include <xxhash.h>\n' |
        cc -E -I "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')" - >/dev/null 2>&1
}
if ! buildable; then
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        bash ../../scripts/apt-install.sh gcc libc6-dev libxxhash-dev python3-dev || true
    fi
    if ! buildable; then
        echo "mmcache-native is not built or tested: install a C compiler, Python's headers and libxxhash's" >&2
        exit 0
    fi
fi
echo "building mmcache-native"
if ! bash ../../scripts/again.sh "$python" -m pip --disable-pip-version-check -qq install --force-reinstall .; then
    echo "mmcache-native could not be built, and is not tested" >&2
fi
rm -rf build ./*.egg-info
