#!/usr/bin/env bash
# Call 1: parity with the CPU, one graph and no waiting over all freezes, and tokens per second beside the peers.
#
#   bash benchmarks/gpu/throughput.sh OUT [LIMIT] [SHAPE] [DEVICE]
#
# OUT receives one JSON a part. LIMIT: seconds, default 240. SHAPE and DEVICE: for a trial on a CPU (tiny cpu).
set -u
out=$(mkdir -p "$1" && realpath "$1") limit=${2:-240} shape=${3:-gpt2} device=${4:-cuda}
source "$(dirname "$0")/bare.sh"
nvidia-smi --query-gpu=name,memory.total,memory.used,utilization.gpu --format=csv,noheader || true
step=131072 threads=4
[ "$device" = cpu ] && step=2048 threads=1

part 20 benchmarks/gpu/parity.py --device "$device" --out "$out/parity.json" >"$out/parity.log" 2>&1 &
part 60 benchmarks/stages.py --shape "$shape" --device "$device" --teacher --without-folded --samples 1 --threads $threads \
    --tokens-per-step $((step / 4)) --out "$out/stages.json" >"$out/stages.log" 2>&1 &
throughput=(benchmarks/train_throughput.py --precision bfloat16 --device "$device" --together --peers benchmarks/gpu/carried/peers
    --out "$out/throughput.json" --threads $threads)
part 60 "${throughput[@]}" --shape "$shape" --tokens-per-step $step --samples 3 --warmup-steps 2 --sample-steps 5 \
    --only ours ours_teacher hf_trainer_compiled --profile "$out/profile.txt"
wait
cat "$out/parity.log" "$out/stages.log"
part 30 "${throughput[@]}" --shape "$shape" --tokens-per-step $step --samples 2 --warmup-steps 1 --sample-steps 2 \
    --only hf_trainer gpt2_noln removing_layer_norm removing_layer_norm_as_published
if [ "$device" = cuda ]; then
    part 50 "${throughput[@]}" --shape gpt2-medium --tokens-per-step 65536 --samples 2 --only ours
fi
echo "[$SECONDS s] done"
