#!/usr/bin/env bash
# Makes a virtual environment and installs this project and its development tools into it.
# usage: PYTHON=python3 scripts/make_venv.sh .venv
# On a machine without an NVIDIA GPU it takes torch's CPU build, which is 20 times smaller.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=${PYTHON:-python3}
torch=torch==2.13.0

say() { printf '%s\n' "$*" >&2; }

command -v "$python" >/dev/null || { say "vlm-batch needs Python 3.11 or newer; $python was not found."; exit 2; }
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  say "vlm-batch needs Python 3.11 or newer; $python is $("$python" -c 'import platform; print(platform.python_version())') (use make PYTHON=python3.12, say)."
  exit 2
fi

make_venv() {
  [ -x "$venv/bin/python" ] && "$venv/bin/python" -c 'import pip' 2>/dev/null && return
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian keeps ensurepip in a package of its own.
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      say "Installing Debian's python3-venv, which $python -m venv needs."
      apt-get -qq update >&2 && apt-get -qq install -y --no-install-recommends python3-venv >&2
    else
      say "$python has no venv module; on Debian: sudo apt-get install python3-venv"
      exit 2
    fi
  fi
  "$python" -m venv "$venv"
}

# The name of the torch that pip would take here, such as torch-2.13.0+cpu.
torch_on_offer() { "$pip" install --dry-run --quiet --no-deps --report - "$torch" 2>/dev/null |
  "$venv/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' 2>/dev/null || true; }

install_torch() {
  "$venv/bin/python" -c 'import torch' 2>/dev/null && return
  local more=()
  if [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
    case "$(torch_on_offer)" in
      *+cpu) ;;
      *) more=(--extra-index-url https://download.pytorch.org/whl/cpu) ;;
    esac
  fi
  "$pip" install -qq ${more[@]+"${more[@]}"} "$torch"
}

make_venv
pip=$venv/bin/pip
export PIP_DISABLE_PIP_VERSION_CHECK=1
say "Installing torch into $venv (a minute or two the first time)."
install_torch
say "Installing vlm-batch and its tools into $venv."
"$pip" install -qq -e '.[dev]'
