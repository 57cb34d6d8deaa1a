#!/usr/bin/env bash
# Fetch what a bare machine lacks into benchmarks/gpu/carried, which git ignores: run this before, on a machine with a package index.
#
#   bash benchmarks/gpu/carry.sh [PEERS]
#
# The wheels are for CPython 3.12 on Linux x86-64. PEERS holds checkouts of gpt2_noLN and removing-layer-norm.
set -eu
cd "$(dirname "$0")/../.."
carried=benchmarks/gpu/carried
rm -rf $carried/wheels $carried/site
.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $carried/wheels --only-binary=:all: \
    --python-version 3.12 --implementation cp --platform manylinux2014_x86_64 -c constraints.txt \
    pydantic pydantic-core annotated-types typing-inspection tomli-w filelock
if [ $# -ge 1 ]; then
    mkdir -p $carried/peers
    cp -r "$1"/*gpt2_noLN* "$1"/*removing-layer-norm* $carried/peers/
fi
[ -d $carried/tokenizer ] || .venv/bin/python benchmarks/gpu/tokenizer.py $carried/tokenizer
du -sh $carried/*
