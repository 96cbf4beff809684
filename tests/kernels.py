"""Kernels of notebooks, forked as `forked` forks commands: nothing has a name in them yet, but what they
import is there at once."""

import os
import signal
import sys
from typing import Any

import forked
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner


class ForkedKernels(AsyncKernelManager):
    """For `NotebookClient(kernel_manager_class=...)`."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.provisioner = ForkedKernel(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)


class ForkedKernel(LocalProvisioner):
    """Starts a kernel as a fork instead of as a program."""

    async def launch_kernel(self, cmd: list[str], **settings: Any) -> Any:
        words = cmd[cmd.index("ipykernel_launcher") + 1 :]
        self.process = ForkedProcess(words, str(settings["cwd"]), dict(settings["env"]))
        self.pid, self.cwd = self.process.pid, settings["cwd"]
        return self.connection_info


class ForkedProcess:
    """What a provisioner asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, *told: Any):
        self.process = forked.SERVER.Process(target=run_kernel, args=told, daemon=True)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def run_kernel(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """What the process does. words: the kernel's own; environment: all of it."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if os.path.dirname(__file__) not in path]  # pytest's additions
    from ipykernel.kernelapp import launch_new_instance

    with open(os.devnull, "w") as nowhere:  # its remarks on how to connect
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    launch_new_instance(words)
