#!/usr/bin/env bash
# Checks and times d2proposals on this machine's GPU: the tests that need one, the time of every
# generator beside RPN, and what the GPU and the CPU propose. At most eight minutes. Results: a
# table, and output/gpu_checks.json.
#
#   bash dev/gpu_checks.sh                            sets the environment up first
#   PYTHON=python3 bash dev/gpu_checks.sh             with that Python as it is, nothing installed
#   bash dev/gpu_checks.sh --only tests,benchmark,parity --output FILE.json
#   bash dev/gpu_checks.sh --device cpu               a dry run at tiny sizes
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-}
if [ -z "$python" ]; then
  bash dev/setup.sh
  python=${D2P_VENV:-$root/.venv}/bin/python
fi
# torch's threads would spin while they wait for each other, at the cost of whatever runs beside.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" dev/gpu_checks.py "$@"
