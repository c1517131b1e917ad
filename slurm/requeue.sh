# shellcheck shell=bash
# Queue a job again if its time runs out and the trainer has saved a checkpoint. The batch scripts source this file.

# train_or_requeue RUN_DIR COMMAND...
# Runs COMMAND (an `accelerate launch`, or srun with one per node) and forwards SIGUSR1 and SIGTERM to it. If SIGUSR1
# arrives and the trainer then saves and stops, the job is queued again under the same id, and resumes when it starts.
# The launcher exits with 1 whatever the trainer's exit code is. So the test is a checkpoint that is newer than the
# signal: checkpoints are written atomically. A run that has finished or failed is not queued again.
train_or_requeue() {
    local run_dir=$1 stop_requested=$1/.stop-requested code=0 launcher interrupted=yes
    shift
    # torchrun forwards SIGTERM and SIGINT to its workers, and SIGUSR1 if it is listed here; it kills them after 110 s
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
    mkdir -p "$run_dir"
    rm -f "$stop_requested"
    "$@" &
    launcher=$!
    trap 'interrupted=yes; touch "$stop_requested"; kill -USR1 "$launcher" || true' USR1
    trap 'interrupted=yes; kill -TERM "$launcher" || true' TERM
    while [ "$interrupted" ]; do # a signal interrupts `wait`, but not the launcher
        interrupted='' code=0
        wait "$launcher" || code=$?
    done
    trap - USR1 TERM
    if [ -e "$stop_requested" ] && [ "$code" -ne 0 ]; then
        if [ -n "$(find "$run_dir" -maxdepth 1 -name 'checkpoint-*' -newer "$stop_requested")" ]; then
            echo "a checkpoint was saved in time; job $SLURM_JOB_ID is queued again"
            rm -f "$stop_requested"
            scontrol requeue "$SLURM_JOB_ID"
        else
            echo "no checkpoint was saved in time; job $SLURM_JOB_ID is not queued again" >&2
        fi
    fi
    rm -f "$stop_requested"
    return "$code"
}
