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
# Up to four processes, which share the cores: torch's threads wait for each other busily, which a
# machine with other work on it pays for many times over.
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
processes=$((cores < 4 ? cores : 4))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes))}
exec "${D2P_VENV:-$root/.venv}/bin/python" -m pytest --numprocesses "$processes" "$@"
