#!/usr/bin/env bash
# Makes .venv-rivals, where the libraries compared with live; never installed beside ours.
# torch comes first so that nothing else pulls a CUDA build in: point PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL at CPU wheels where the default index has only CUDA ones.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly venv=.venv-rivals
readonly python="${PYTHON:-python3.11}"

[[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

echo "rivals: torch (large)"
pip 'torch==2.13.0'
echo "rivals: google-tunix, trl"
pip 'google-tunix==0.1.7' 'trl==1.16.*' transformers datasets accelerate tokenizers jinja2 jmespath
"$venv/bin/python" -m pip list --format=freeze 2>/dev/null \
  | grep -iE '^(google-tunix|trl|torch|transformers|datasets|accelerate|jax|jaxlib|flax|optax)=='
