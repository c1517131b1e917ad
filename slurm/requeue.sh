# shellcheck shell=bash
# Queue a job again if its time runs out and the trainer has saved a checkpoint. The batch scripts source this file.

# train_or_requeue RUN_DIR COMMAND...
# Runs COMMAND (an `accelerate launch`, or srun with one per node) and forwards SIGUSR1 to it. If the trainer then saves
# and stops, the job is queued again under the same id, and resumes when it starts. The launcher exits with 1 whatever
# the trainer's exit code is. So the test is a newer checkpoint than the newest one at the signal: checkpoints are
# written atomically. A run that has finished or failed is not queued again.
train_or_requeue() {
    local run_dir=$1 time_is_up='' last_checkpoint='' code=0 interrupted=yes
    shift
    # torchrun forwards SIGTERM and SIGINT to its workers, and SIGUSR1 if it is listed here; it kills them after 110 s
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
    trap 'interrupted=yes; ask_to_stop' USR1
    # scancel sends SIGTERM to all processes of the job; a second one would end torchrun before its workers have saved
    trap 'interrupted=yes' TERM
    "$@" &
    while [ "$interrupted" ]; do # a signal interrupts `wait`, but not the launcher
        interrupted='' code=0
        wait $! || code=$?
    done
    trap - USR1 TERM
    if [ "$time_is_up" ] && [ "$code" -ne 0 ]; then
        if [ "$(newest_checkpoint "$run_dir")" != "$last_checkpoint" ]; then
            echo "a checkpoint was saved in time; job $SLURM_JOB_ID is queued again"
            scontrol requeue "$SLURM_JOB_ID"
        else
            echo "no checkpoint was saved in time; job $SLURM_JOB_ID is not queued again" >&2
        fi
    fi
    return "$code"
}

ask_to_stop() { # with the variables of train_or_requeue
    echo "the time of job $SLURM_JOB_ID is nearly up; the trainer is asked to save a checkpoint and stop"
    [ "$time_is_up" ] || last_checkpoint=$(newest_checkpoint "$run_dir")
    time_is_up=yes
    kill -USR1 %% || true # %% is the launcher
}

newest_checkpoint() {
    find "$1" -maxdepth 1 -name 'checkpoint-*' 2>/dev/null | sort -V | tail -n 1 || true
}
