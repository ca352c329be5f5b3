#!/usr/bin/env bash
# Sets up the environment and runs the tests.
#
#   bash dev/test.sh                 all tests
#   bash dev/test.sh -m "not slow"   further arguments go to pytest
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash dev/setup.sh
# This checkout's package, also where several checkouts share the environment.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${D2P_VENV:-$root/.venv}/bin/python" -m pytest "$@"
