#!/usr/bin/env bash
# Call 2: pretrain a model of GPT-2 small's shape, then remove its LayerNorms in several ways at equal tokens.
#
#   bash benchmarks/gpu/removal.sh OUT [LIMIT] [PRETRAIN_STEPS] [STEPS]
#   bash benchmarks/gpu/removal.sh OUT 600 20 8 cpu        # a trial
set -u
out=$(mkdir -p "$1" && realpath "$1") limit=${2:-420} pretrain_steps=${3:-450} steps=${4:-140} device=${5:-cuda}
source "$(dirname "$0")/bare.sh"
nvidia-smi --query-gpu=name,memory.total,memory.used,utilization.gpu --format=csv,noheader || true
work=$(mktemp -d)
few=() small=() tokens=80000000
if [ "$device" = cpu ]; then
    tokens=600000
    few=(--set architecture.n_layer=2 --set architecture.n_embd=64 --set architecture.n_head=2 --set data.context=128
        --set training.tokens_per_step=1024 --set training.evaluation_tokens=4096)
    small=(--layers 2 --tokens-per-step 1024 --micro-batch 8 --context 128 --validation-tokens 8192)
fi
part 60 -m ln_removal.cli.prepare python-source --tokenizer $carried/tokenizer --max-tokens $tokens --out "$work/tokens"
pretrain=(-m ln_removal.cli.pretrain --recipe benchmarks/gpu/gpt2-python.toml --steps "$pretrain_steps"
    --tokens "$work/tokens" --device "$device" --json "${few[@]}")
part 60 "${pretrain[@]}" --out "$work/base" >"$out/pretrain.json" 2>"$out/pretrain.log"
if [ ! -f "$work/base/model/config.json" ]; then # the choice of the micro-batch is what may fail on a new device
    tail -5 "$out/pretrain.log"
    rm -rf "$work/base"
    part 60 "${pretrain[@]}" --set training.micro_batch=32 --out "$work/base" >"$out/pretrain.json" 2>"$out/pretrain.log"
fi
cat "$out/pretrain.json"
tail -3 "$out/pretrain.log"
cp "$work/base/metrics.jsonl" "$out/pretrain-metrics.jsonl"
part 60 benchmarks/gpu/removal.py --model "$work/base/model" --tokens "$work/tokens" --out "$work/arms" --steps "$steps" \
    --device "$device" "${small[@]}"
cp "$work/arms/removal.json" "$out/" || tail -n 3 "$work"/arms/*.log
mkdir -p "$out/logs" && tail -c 2000 "$work"/arms/*.log >"$out/logs/arms.log"
echo "[$SECONDS s] done"
