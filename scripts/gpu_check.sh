#!/usr/bin/env bash
# Tests and benchmarks on a GPU, without a network, in under 8 minutes; see scripts/gpu_check.py.
#
#     scripts/gpu_check.sh WHEELS OUT.json [--cpu]
#
# WHEELS is a folder made by scripts/gpu_wheels.sh. PYTHON names an interpreter that has torch, python3 by default.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
