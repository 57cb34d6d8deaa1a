# Sourced by the scripts beside it: run from a plain copy of the tree, on a machine where nothing of this project is installed.
# What carry.sh fetched before is installed into a folder of its own, without a network.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
carried=benchmarks/gpu/carried
python=${python:-python3}
if [ ! -d $carried/site ]; then
    $python -m pip install --quiet --no-index --no-deps --target $carried/site $carried/wheels/*.whl
fi
export PYTHONPATH="$PWD:$PWD/benchmarks:$PWD/$carried/site" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true

# part SECONDS COMMAND...: run it if so much of $limit is left, and stop it when the time is up.
part() {
    local needs=$1 left=$((limit - SECONDS))
    shift
    if [ "$left" -lt "$needs" ]; then
        echo "[$SECONDS s] skipped, $left s left: $*"
        return
    fi
    echo "[$SECONDS s] $*"
    timeout --signal=INT --kill-after=15 "$left" "$python" "$@" || echo "[$SECONDS s] ended with $?: $*"
}
