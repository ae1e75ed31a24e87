"""Training runs in processes of their own, forked from one that has imported what they need: each starts at once."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

# Modules that a run imports only when it needs them.
NEEDED = ("bn_affine_adapters.training.loop", "bn_affine_adapters.deploy.exporting", "evaluate", "sklearn.datasets")
CONTEXT = multiprocessing.get_context("forkserver")


def start(arguments, log, processes=1):
    """Start the processes of a run, as `recipes/train.py` and torchrun would; what they print goes to a file."""
    CONTEXT.set_forkserver_preload([*NEEDED, "forked"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {"ACCELERATE_USE_CPU": "true"}
        if processes > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {name: str(number) for name, number in numbers.items()}
        started.append(CONTEXT.Process(target=train, args=(arguments, environment, str(log))))
        started[-1].start()
    return started


def train(arguments, environment, log):
    """Be a training run: the rest of this process."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    os.chdir(Path(__file__).parents[2])
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in a process that was not forked itself
    sys.argv = ["recipes/train.py", *arguments]
    from bn_affine_adapters.training.train import main

    main()
