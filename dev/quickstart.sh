#!/usr/bin/env bash
# From a fresh machine to a trained proposal generator: sets up the environment, renders the
# embedded dataset, trains the small ZIP on it, and prints its recall beside two baselines.
# About five minutes on two CPU cores after the installation.
#
#   bash dev/quickstart.sh                        results in output/quickstart
#   bash dev/quickstart.sh SOLVER.MAX_ITER 2000   further arguments override the configuration
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash dev/setup.sh
# Half the cores for torch: the data loader works beside it, and torch's threads wait for each other
# busily, which a machine with other work on it pays for many times over.
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${D2P_VENV:-$root/.venv}/bin/python" dev/quickstart.py "$@"
