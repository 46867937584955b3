
# This job is one of a chain. With time left it starts again itself; at the end of its time the next one goes on.
if [ "$((${SLURM_JOB_END_TIME:-0} - $(date +%s)))" -lt @{least_seconds} ]; then
    echo "left to the next job of the chain: $why"
    exit "$status"
fi
