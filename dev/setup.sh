#!/usr/bin/env bash
# Sets up the environment that the tests and the quick start use: a virtual environment with the
# pinned requirements, Detectron2, and this package (editable).
#
#   bash dev/setup.sh            into .venv of this repository
#   D2P_VENV=DIR bash dev/setup.sh   into DIR (several checkouts may share one)
#   PYTHON=python3.12 ...        with that Python (3.11 or newer)
#
# Running it again takes a second when nothing changed, and finishes what was interrupted.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${D2P_VENV:-$root/.venv}
python=${PYTHON:-python3}
fail() { echo "setup: $*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "no '$python' found. Install Python 3.11 or newer, or name one: PYTHON=python3.12 bash dev/setup.sh"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$python" --version) is too old, the pinned requirements need 3.11 or newer. Name a newer one: PYTHON=python3.12 bash dev/setup.sh"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "$python cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv"

mkdir -p "$(dirname "$venv")"
# One set-up at a time: checkouts may share the folder.
if command -v flock >/dev/null; then
  exec 9>"$venv.lock"
  flock 9
fi

wanted=$(cat "$root/dev/requirements.txt" "$root/dev/install_detectron2.py" | sha256sum | cut -d' ' -f1)
finished="$venv/d2proposals-setup-finished"    # holds what was installed, written last
unfinished="$venv/d2proposals-setup-unfinished" # stands while an installation runs

if [ "$(cat "$finished" 2>/dev/null)" != "$wanted" ]; then
  if [ -e "$unfinished" ]; then
    echo "setup: an earlier set-up of $venv was interrupted; starting it afresh."
    rm -rf "$venv"
  fi
  if [ ! -e "$venv/bin/python" ]; then
    free_kib=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 {print $4}')
    [ "$free_kib" -ge $((7 * 1024 * 1024)) ] ||
      fail "only $((free_kib / 1024)) MiB free for $venv, 7 GiB are needed. Free some, or set D2P_VENV to a folder on another disk."
  fi
  echo "setup: installing into $venv (about two minutes, 5.5 GB)."
  mkdir -p "$venv"
  touch "$unfinished"
  rm -f "$finished"
  "$python" -m venv "$venv"
  set +e
  "$venv/bin/python" -m pip --disable-pip-version-check install -r "$root/dev/requirements.txt" |
    grep -E '^ *(Collecting|Downloading|Using cached|Installing|Successfully)'
  pip_status=${PIPESTATUS[0]}
  set -e
  [ "$pip_status" -eq 0 ] ||
    fail "pip could not install the requirements (see above). Check the connection and the disk, then run this again."
  # One that this script installed earlier makes place for that of its present version.
  if grep -qs '^Generator: d2proposals' "$venv"/lib/python*/site-packages/detectron2-*.dist-info/WHEEL; then
    "$venv/bin/python" -m pip --disable-pip-version-check -q uninstall -y detectron2
  fi
  "$venv/bin/python" "$root/dev/install_detectron2.py"
  echo "$wanted" >"$finished"
  rm -f "$unfinished"
fi

# The package itself, editable: from this checkout, also where several share the environment.
if [ "$(cat "$venv/d2proposals-checkout" 2>/dev/null)" != "$root $(sha256sum "$root/setup.py" | cut -d' ' -f1)" ]; then
  "$venv/bin/python" -m pip --disable-pip-version-check -q install --no-deps --no-build-isolation -e "$root"
  echo "$root $(sha256sum "$root/setup.py" | cut -d' ' -f1)" >"$venv/d2proposals-checkout"
fi
echo "setup: ready. To use it: source $venv/bin/activate"
