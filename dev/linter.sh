#!/usr/bin/env bash
# Formats the code and checks its style (settings in pyproject.toml; of the gallery's script in
# .oxlintrc.json).
#
#   bash dev/linter.sh           formats, and mends what can be mended
#   bash dev/linter.sh --check   changes nothing, fails where something is off
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
ruff=(python3 -m ruff)
oxlint=(oxlint)
bin="${D2P_VENV:-$root/.venv}/bin"
[ -x "$bin/ruff" ] && ruff=("$bin/ruff")
[ -x "$bin/oxlint" ] && oxlint=("$bin/oxlint")
if [ "${1:-}" = --check ]; then
  "${ruff[@]}" format --check .
  "${ruff[@]}" check .
else
  "${ruff[@]}" format .
  "${ruff[@]}" check --fix .
fi
"${oxlint[@]}" --deny-warnings .
