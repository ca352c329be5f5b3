#!/usr/bin/env bash
# From a fresh machine to a trained proposal generator: sets up the environment, draws what the
# SC-RPN of this package proposes on photographs, then renders the embedded dataset, trains the small
# ZIP on it, and prints its recall beside two baselines. Minutes on two CPU cores after the
# installation.
#
#   bash dev/quickstart.sh                        results in output/quickstart
#   bash dev/quickstart.sh SOLVER.MAX_ITER 2000   further arguments override the configuration
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash dev/setup.sh
# torch's threads would spin while they wait for each other, at the cost of whatever runs beside.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${D2P_VENV:-$root/.venv}/bin/python" dev/quickstart.py "$@"
