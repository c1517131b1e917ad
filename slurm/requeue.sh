# shellcheck shell=bash
# What becomes of a job whose time runs out? The batch scripts beside this file source it.

# train_or_requeue RUN_DIR COMMAND...
# Runs COMMAND, an `accelerate launch` or an srun of some, and passes SIGUSR1 and SIGTERM on to it. If SIGUSR1 came and
# the trainer then saved and stopped, the job goes back into the queue; it will go on from there, under the same job id.
# The launcher ends with 1 whatever the trainer's code was, so what counts is a checkpoint younger than the signal:
# checkpoints appear whole or not at all. A run that came to its end, or died, is not queued again.
train_or_requeue() {
    local run_dir=$1 asked_at=$1/.asked-to-stop code=0 launcher interrupted=yes
    shift
    # torchrun passes SIGTERM and SIGINT on to its workers by itself, SIGUSR1 if told to, and kills them after this time
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
    mkdir -p "$run_dir"
    rm -f "$asked_at"
    "$@" &
    launcher=$!
    trap 'interrupted=yes; touch "$asked_at"; kill -USR1 "$launcher" || true' USR1
    trap 'interrupted=yes; kill -TERM "$launcher" || true' TERM
    while [ "$interrupted" ]; do # a signal ends the wait, not the launcher
        interrupted='' code=0
        wait "$launcher" || code=$?
    done
    trap - USR1 TERM
    if [ -e "$asked_at" ] && [ "$code" -ne 0 ]; then
        if [ -n "$(find "$run_dir" -maxdepth 1 -name 'checkpoint-*' -newer "$asked_at")" ]; then
            echo "stopped and saved in time; job $SLURM_JOB_ID goes back into the queue"
            rm -f "$asked_at"
            scontrol requeue "$SLURM_JOB_ID"
        else
            echo "asked to stop, but no checkpoint was written; job $SLURM_JOB_ID is not queued again" >&2
        fi
    fi
    rm -f "$asked_at"
    return "$code"
}
