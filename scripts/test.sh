#!/usr/bin/env bash
# Sets everything up on a fresh machine and runs the tests (about 8 minutes on 2 CPU cores; -m "not slow": about 2).
#   ./scripts/test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh "dev"
echo "[2/2] Running the tests"
exec .venv/bin/python -m pytest "$@"
