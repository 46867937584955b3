#!/bin/bash
@{sbatch}
# Written by `python -m launch submit`. It starts a run or goes on with it, so that `sbatch` of this file always does
# the right thing: once more by hand, requeued, or as the next job of a chain.
set -u
job_directory=@{job_directory}
finished=$job_directory/finished # made when the run needs no further start; holds its exit status

if [ -e "$finished" ]; then
    read -r status < "$finished"
    echo "this run has ended with status $status: nothing to do (delete $finished to start it anyway)"
    exit "$status"
fi

@{environment}

cd @{working_directory} || exit 2

# SIGTERM and SIGUSR1 are for the training processes, which save and end. This script outlives them to see how.
interrupted=
trap 'interrupted=1' TERM USR1
srun @{srun} \
    @{command} &
step=$!
while :; do
    interrupted=
    wait "$step"
    status=$?
    [ -z "$interrupted" ] && break
done

restarts=${SLURM_RESTART_COUNT:-0}
echo "$(date -Is) job $SLURM_JOB_ID, start $((restarts + 1)), on $SLURM_JOB_NODELIST: status $status" |
    tee -a "$job_directory/history.log"

case $status in
    75) why="made room, its state is saved" ;;
    76) why="the watchdog ended it, or a process lost another" ;;
    # 128 + the signal that ended a process: ABRT, BUS, KILL, USR1, SEGV, ALRM, TERM.
    134 | 135 | 137 | 138 | 139 | 142 | 143) why="a process was killed or crashed" ;;
    *)
        echo "$status" > "$finished"
        exit "$status"
        ;;
esac
job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
case $job in
    *" JobState=RUNNING "*) ;;
    *)
        echo "not requeued: $why, but Slurm itself is ending this job (cancelled, or out of time)"
        exit "$status"
        ;;
esac
@{chain}
if [ "$restarts" -ge @{restart_limit} ]; then
    echo "not requeued: $why, but this was restart $restarts of at most @{restart_limit}"
    exit "$status"
fi
# Slurm requeues by itself when a node fails, and not when a job's exit status asks for it.
echo "requeued: $why"
scontrol requeue "$SLURM_JOB_ID" || exit "$status"
