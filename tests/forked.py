"""`scfm` commands as processes of their own, without the seconds that each would import for: they are forked
from one process that has imported what they need and done nothing else."""

import multiprocessing
import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "scfm.data.prepare",
        "scfm.training.flow_trainer",
        "scfm.training.selection",
        "toy.pipelines",
        "ipykernel.kernelapp",  # last: tqdm's bars are those of notebooks where it is there
    ]
)


def start(words: list, log: Path, **environment: str) -> BaseProcess:
    """Starts the command. words: as behind `scfm`; log: the file that gets all that it prints. The exit code
    is the process's `exitcode` after `join`; a signal's is negative."""
    # daemon: does not outlive a test run that was ended
    process = SERVER.Process(target=command, args=(list(map(str, words)), log, environment), daemon=True)
    process.start()
    return process


def start_two(words: list, log: Path) -> list[BaseProcess]:
    """The command in two processes of one group, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(words, log, RANK=rank, LOCAL_RANK=rank, ACCELERATE_USE_CPU="true", **group) for rank in "01"
    ]


def run_two(words: list, log: Path, seconds: float = 300) -> None:
    """`start_two`, waited for. AssertionError with the end of what they printed when one fails."""
    processes = start_two(words, log)
    for process in processes:
        process.join(seconds)
    assert [process.exitcode for process in processes] == [0, 0], log.read_text()[-2000:]


def command(words: list[str], log: Path, environment: dict[str, str]) -> None:
    """What the process does."""
    os.environ.update(environment)
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    from scfm.cli import main

    sys.exit(main(words))
