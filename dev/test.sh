#!/usr/bin/env bash
# Sets up the environment and runs the tests.
#
#   bash dev/test.sh                 all tests
#   bash dev/test.sh -m "not slow"   further arguments go to pytest
#
# The gallery's page is tested in Chromium, where there is one (Debian, Ubuntu: apt-get install
# chromium chromium-driver); elsewhere these tests are skipped, with the reason.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash dev/setup.sh
# This checkout's package, also where several checkouts share the environment.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# Up to four processes, which share the cores; one that has run out of tests takes some of another's.
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
processes=$((cores < 4 ? cores : 4))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes))}
# torch's threads would spin while they wait for each other.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "${D2P_VENV:-$root/.venv}/bin/python" -m pytest --numprocesses "$processes" --dist worksteal "$@"
