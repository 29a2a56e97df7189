#!/usr/bin/env bash
# Real SGLang 0.5.23 and this checkout of mmcache, into an environment of their own: install-sglang.sh [VENV [MORE]]
# VENV is .engines/sglang unless given, MORE a file of further requirements (tests/data/sglang-diffusion-...: what its
# diffusion engine needs); 3 GB and minutes the first time, nothing when it is complete already.
# PYTHON names the interpreter to build it with. pip fetches from wherever it is configured to; a CPU build of torch
# is taken where one is offered, the CUDA build works too. SGLang compiles its page hashes when it first starts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=${1:-.engines/sglang}
requirements=(tests/data/sglang-cpu-0.5.23.txt ${2:+"$2"})
stamp=$venv/.stamp-$(cat "${requirements[@]}" tests/engines/install-sglang.sh pyproject.toml | sha256sum | cut -c1-16)
if [ -e "$stamp" ]; then
    exit 0
fi
if ! command -v g++ >/dev/null || ! echo '#include <openssl/sha.h>' | g++ -E -x c++ - >/dev/null 2>&1; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "error: SGLang needs g++ and OpenSSL's headers; install them (Debian, Ubuntu: g++ libssl-dev)" >&2
        exit 1
    fi
    bash scripts/apt-install.sh g++ libssl-dev
fi
echo "installing SGLang into $venv: minutes, 3 GB"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip=(bash scripts/again.sh "$venv/bin/python" -m pip --disable-pip-version-check -qq)
"${pip[@]}" install torch==2.13.0
"${pip[@]}" install --no-deps "${requirements[@]/#/--requirement=}"  # frozen: complete as it is
"${pip[@]}" install --editable '.[bench,cluster]' pytest pytest-timeout
PYTHONPATH=tests/engines/sglang/shim SGLANG_USE_CPU_ENGINE=1 \
    "$venv/bin/python" -W ignore -c 'import mmcache, sglang; print("sglang", sglang.__version__, "mmcache", mmcache.__version__)'
rm -f "$venv"/.stamp-*
touch "$stamp"
