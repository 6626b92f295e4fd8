#!/usr/bin/env bash
# Wheels of what `scripts/gpu_check.sh` needs on a machine without a network: our dependencies without torch, and pytest.
#
#     scripts/gpu_wheels.sh FOLDER [PYTHON_VERSION [PLATFORM...]]
#     scripts/gpu_wheels.sh build/wheels 3.12 manylinux_2_28_x86_64 manylinux2014_x86_64
#
# Python and platform are this machine's by default. Left out for their size, and not needed there: wandb, SciPy and
# scikit-learn. PYTHON names the interpreter, python3 by default.
set -euo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 1
fi
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
most_mb=60

mapfile -t names < <("$python" - <<'PY'
import configparser
import re

parser = configparser.ConfigParser()
parser.read("setup.cfg")
for line in parser["options"]["install_requires"].split():
    if re.match(r"[\w-]+", line)[0] not in ("torch", "wandb", "scipy", "scikit-learn"):
        print(line)
print("pytest>=9.0")
PY
)
target=()
if [ $# -gt 0 ]; then
    target+=(--implementation cp --python-version "$1")
    shift
fi
for platform in "$@"; do
    target+=(--platform "$platform")
done
"$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: -c constraints.txt "${target[@]}" \
    -d "$folder" "${names[@]}"

mb=$(($(du -sk "$folder" | cut -f1) / 1024))
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $mb MB, in '$folder'"
if [ "$mb" -ge "$most_mb" ]; then
    echo "more than $most_mb MB: leave out a package in $0, or give an empty folder" >&2
    exit 1
fi
