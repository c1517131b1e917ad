"""A host of a rehearsal: the ranks of one network namespace, forked from a process with the imports done.

    host.py RANKS FIRST_RANK WORLD_SIZE LOG_DIR trainer options …

It prints "ready", starts the ranks when it reads a line, and as torch's launcher does, ends all if one fails. Its exit
code is the first that is not 0. The output of rank R goes to LOG_DIR/rank-R.log. With $SLOW_S, every forward pass of
these ranks takes so many seconds longer.
"""

import os
import signal
import sys
import time
from functools import wraps
from pathlib import Path

import fork_server

from modeling_minigpt import MiniGPTForCausalLM

PATIENCE_S = 30  # of torch's launcher, between SIGTERM and SIGKILL

fork_server.preload()
count, first, world = map(int, sys.argv[1:4])
log_dir, words = Path(sys.argv[4]), sys.argv[5:]
print("ready", flush=True)
address = sys.stdin.readline().split()


def become_rank(local: int) -> None:
    rank = first + local
    with (log_dir / f"rank-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": address[0], "MASTER_PORT": address[1], "ACCELERATE_MIXED_PRECISION": "no",
    }  # fmt: skip
    if slow_s := float(os.environ.get("SLOW_S", 0)):
        forward = MiniGPTForCausalLM.forward

        @wraps(forward)
        def slow_forward(*args: object, **options: object) -> object:
            time.sleep(slow_s)
            return forward(*args, **options)  # type: ignore[arg-type]

        MiniGPTForCausalLM.forward = slow_forward  # type: ignore[method-assign, assignment]
    fork_server.run_program([str(fork_server.ROOT / "train_accelerate.py"), *words])


pids = []
for local in range(count):
    pid = os.fork()
    if pid == 0:
        become_rank(local)
    pids.append(pid)
code = 0
while pids:
    pid, status = os.wait()
    pids.remove(pid)
    if (ended := os.waitstatus_to_exitcode(status)) and not code:
        code = ended
        for other in pids:
            os.kill(other, signal.SIGTERM)
        signal.signal(signal.SIGALRM, lambda *_: [os.kill(other, signal.SIGKILL) for other in pids])
        signal.alarm(PATIENCE_S)
sys.exit(code if code >= 0 else 128 - code)
