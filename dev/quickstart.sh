#!/usr/bin/env bash
# From a fresh machine to a trained proposal generator: sets up the environment, renders the
# embedded dataset, trains the small ZIP on it, and prints its recall beside two baselines.
# Three to five minutes on two CPU cores after the installation; on a machine that has other work to
# do, OMP_NUM_THREADS=1 in front is faster, because torch's threads wait for each other busily.
#
#   bash dev/quickstart.sh                        results in output/quickstart
#   bash dev/quickstart.sh SOLVER.MAX_ITER 2000   further arguments override the configuration
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash dev/setup.sh
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${D2P_VENV:-$root/.venv}/bin/python" dev/quickstart.py "$@"
