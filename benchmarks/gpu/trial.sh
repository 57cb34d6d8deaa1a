#!/usr/bin/env bash
# Run every part of every call on this machine's CPU, at small sizes, as a lent machine would: in an environment that has only the
# packages of packages.txt, from a copy of the committed tree. This takes up to an hour on one core.
#
#   bash benchmarks/gpu/trial.sh DIR [PYTHON3.12]
#
# carry.sh must have run. DIR keeps environment, copy and results; the same command again goes on with what is missing.
set -eu
mkdir -p "$1"
place=$(realpath "$1") python=${2:-python3.12}
cd "$(dirname "$0")/../.."
if [ ! -f "$place/environment/made" ]; then
    "$python" -m venv --clear "$place/environment"
    "$place/environment/bin/python" -m pip install --quiet --disable-pip-version-check -r benchmarks/gpu/packages.txt
    "$place/environment/bin/python" -m pip uninstall --quiet --yes pydantic pydantic_core annotated-types typing-inspection tomli-w
    touch "$place/environment/made"
fi
mkdir -p "$place/tree"
git archive HEAD | tar -x -C "$place/tree"
rm -rf "$place/tree/benchmarks/gpu/carried"
cp -r benchmarks/gpu/carried "$place/tree/benchmarks/gpu/"
for call in speed removal longer; do
    OMP_NUM_THREADS=1 "$place/environment/bin/python" "$place/tree/benchmarks/gpu/call.py" $call "$place/out" --device cpu --seconds 3600 ||
        echo "$call: not all parts have ended well"
done
