#!/usr/bin/env bash
# Everything that needs a GPU, on one GPU, in under ten minutes; the most important part first.
#
#   bash benchmarks/gpu.sh [PEERS]
#
# PEERS: folder with checkouts of ApolloResearch/gpt2_noLN, submarat/removing-layer-norm and Nandan91/relu-revival-normfree;
# without it they are left out.
# PYTHON: the interpreter; default .venv/bin/python, else python3. Parts for which no time is left are skipped; what is measured is
# in benchmarks/results/ as soon as a shape is done.
set -u
cd "$(dirname "$0")/.."

limit=${LIMIT:-590}
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
peers=()
[ $# -ge 1 ] && peers=(--peers "$1")
nvidia-smi --query-gpu=name,memory.total,utilization.gpu --format=csv,noheader

# part SECONDS COMMAND...: run it if so much time is left, and stop it when the time is up.
part() {
    local needs=$1 left=$((limit - SECONDS))
    shift
    if [ "$left" -lt "$needs" ]; then
        echo "skipped, $left s left: $*"
        return
    fi
    echo "[$SECONDS s] $*"
    timeout --signal=INT --kill-after=20 "$left" "$python" "$@" || echo "ended with $?: $*"
}

throughput=(benchmarks/train_throughput.py --precision bfloat16 --device cuda)
part 60 "${throughput[@]}" --shape gpt2 "${peers[@]}" --tokens-per-step 262144 --samples 3 --sample-steps 2 --warmup-steps 2 \
    --only ours hf_trainer_compiled hf_trainer gpt2_noln removing_layer_norm removing_layer_norm_as_published
part 40 benchmarks/cross_entropy.py --shape gpt2 --positions 32768 --samples 5
part 90 benchmarks/stages.py --shape gpt2 --device cuda --tokens-per-step 262144 --samples 1
part 75 benchmarks/revival_throughput.py --shape gpt2 "${peers[@]}" --device cuda --samples 3
for shape in gpt2-medium gpt2-large gpt2-xl; do
    part 75 "${throughput[@]}" --shape $shape --tokens-per-step 65536 --samples 2 --only ours
done
echo "[$SECONDS s] done"
