#!/usr/bin/env bash
# Runs the tests: all of them, in TEST_PROCESSES processes (2), or what pytest arguments choose, such
# as tests/core -k config.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

ensure_installed
for argument in "$@"; do
  if [[ -e "${argument%%::*}" ]]; then
    exec python -m pytest -q "$@"
  fi
done
# Whoever takes a crashed worker's place may wait for ever for its next test.
exec python -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile --max-worker-restart=0 tests "$@"
