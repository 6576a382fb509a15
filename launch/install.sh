# Sourced by the scripts of this folder: makes .venv, installs agentrl[test,viz], activates it.
#
# Installs only when setup.py, this file or the interpreter changed since the last install that
# ended well; the checksum of that install is in .venv/agentrl-install. PYTHON picks the
# interpreter.
# shellcheck shell=bash

die() {
  echo "error: $*" >&2
  exit 1
}

supported() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# Prints the first interpreter of a supported version.
find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    supported "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if supported "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die "agentrl needs Python 3.11, 3.12 or 3.13; python3 is $(python3 --version 2>&1 || true)." \
    "Install one, or name it: PYTHON=/path/to/python3.12 bash $0"
}

# The interpreter's path is part of it: a copied or moved .venv points at another one.
checksum() {
  { cat setup.py launch/install.sh; pwd; .venv/bin/python -VV; } | cksum
}

# Prints the version of torch that setup.py asks for, so that it is written once.
torch_pin() {
  sed -n "s/.*'\(torch==[^']*\)'.*/\1/p" setup.py
}

ensure_installed() {
  local stamp=.venv/agentrl-install python
  # Two terminals would install into one another's half-made .venv. This file itself is the lock, so
  # that none stays behind; where there is no flock, as on macOS, they are not kept apart.
  exec 9<launch/install.sh
  if command -v flock >/dev/null && ! flock -n 9; then
    echo "waiting for another install to end" >&2
    flock 9
  fi
  if [[ ! -f "$stamp" ]] || [[ "$(cat "$stamp")" != "$(checksum)" ]]; then
    rm -f "$stamp"
    if ! supported .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
      python="$(find_python)"
      echo "making .venv with $("$python" --version)" >&2
      "$python" -m venv --clear .venv \
        || die "$python cannot make a virtual environment; its venv module may be missing"
    fi
    echo "installing agentrl[test,viz] into .venv (a few minutes the first time)" >&2
    # First, and from an index of its own: PyPI's build for Linux brings CUDA's libraries along.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$(torch_pin)" \
      --extra-index-url https://download.pytorch.org/whl/cpu \
      || die "pip install failed; the messages above say why. Run the same command to try again."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,viz]' \
      || die "pip install failed; the messages above say why. Run the same command to try again."
    checksum >"$stamp"
  fi
  exec 9>&-
  # shellcheck source=/dev/null
  source .venv/bin/activate
}
