# on_gpu.sh N COMMAND...: run a command on a GPU of this machine that no other has.
# Snakemake counts GPUs and does not number them; a lock on a file is a number.
n=$1
shift
mkdir -p runs
list=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((n - 1)))}  # on a shared machine, some
for gpu in $(seq 0 $((n - 1))); do
    exec 9> "runs/gpu$gpu.lock"
    if flock -n 9; then
        CUDA_VISIBLE_DEVICES=$(echo "$list" | cut -d, -f$((gpu + 1))) exec "$@"
    fi
done
echo "All $n GPUs are taken: give --resources gpu=$n." >&2
exit 1
