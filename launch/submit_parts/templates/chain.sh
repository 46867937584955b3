
# This job is one of a chain. With time left it starts again itself; at the end of its time the next one goes on.
end=${job##* EndTime=}
end=$(date --date "${end%% *}" +%s 2> /dev/null || echo 99999999999) # Unknown: no limit
if [ "$((end - $(date +%s)))" -lt @{least_seconds} ]; then
    echo "left to the next job of the chain: $why"
    exit "$status"
fi
