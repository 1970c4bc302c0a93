#!/usr/bin/env bash
# Sets everything up on a fresh machine and trains the embedded default. Safe to run again: a finished run is shown.
#   ./scripts/quickstart.sh [arguments of scripts/train.py]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh "plots"
echo "[2/2] Training experiment=quickstart (about 2 minutes on 2 CPU cores)"
exec .venv/bin/python scripts/train.py "$@"
