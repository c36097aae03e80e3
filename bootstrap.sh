#!/bin/sh
# Makes the virtual environment: bootstrap.sh PYTHON VENV
# Debian keeps venv and Python.h in packages of their own; where they are missing they are installed, or asked for.
set -eu
python=$1 venv=$2

say() { printf '%s\n' "$*" >&2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    say "lwkd needs Python 3.10 or newer; $python is $("$python" --version 2>&1). Set PYTHON=…"
    exit 1
}
command -v "${CXX:-c++}" >/dev/null || { say "No C++ compiler found. Install g++, or set CXX=…"; exit 1; }

complete() {
    "$python" -c '
import ensurepip, os, sys, sysconfig, venv
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}

if ! complete; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    as_root=""
    [ "$(id -u)" = 0 ] || as_root=sudo
    if command -v apt-get >/dev/null && { [ -z "$as_root" ] || command -v sudo >/dev/null; }; then
        say "Installing python$version-venv and python$version-dev"
        $as_root apt-get update -qq
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            "python$version-venv" "python$version-dev" >/dev/null
    fi
    complete || { say "$python lacks venv or Python.h. Install python$version-venv and python$version-dev."; exit 1; }
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
