#!/usr/bin/env bash
# From a fresh clone to a trained tool-using agent. Arguments are passed on, such as
# --config.seed=1 or another --workdir.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

ensure_installed
exec python -m agentrl.main --config=configs/quickstart.py --workdir=runs/quickstart "$@"
