"""Processes and kernels that are forked from one that has imported what takes long.

A new Python imports torch for 4 CPU-seconds, and what an optimizer imports later for 3 more. All processes here, the workers
that the package starts in them included, come from one server a pytest process.
"""
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial

import pytest

from attnnas.evidence import executor  # it asks for imports of its own; those below are more

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "attnnas.evidence.batch", "accelerate", "timm", "matplotlib.pyplot", "pandas",
                              "execnb.shell", "ipykernel.kernelapp", "matplotlib_inline.backend_inline", "papermill", "pytest"])
START_WORKER, TAKE_PART = executor._start_worker, executor._take_part


class Forked:
    "A process in a group of its own that does `work`, with the methods of Popen. It writes to `output`."

    def __init__(self, work, *arguments, output=os.devnull, **environment):
        self.process = FORKS.Process(target=_be, args=(work, arguments, output, dict(os.environ) | environment))
        self.process.start()
        self.pid = self.process.pid
        with suppress(ProcessLookupError):
            while self.poll() is None and os.getpgid(self.pid) != self.pid: time.sleep(.01)

    stdin = stdout = stderr = None

    def poll(self): return self.process.exitcode

    def wait(self, timeout=None) -> int:
        self.process.join(timeout)
        if self.poll() is None: raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def kill(self): self.send_signal(signal.SIGKILL)

    def terminate(self): self.send_signal(signal.SIGTERM)


def _be(work, arguments, output, environment):
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what runs in the background
    with open(output, "a") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ |= environment
    adopt()
    work(*arguments)


def adopt():
    "In a forked process: have what this one starts forked from the same server, workers in the group of this process."
    gc.freeze()  # what was imported is neither looked through nor copied when garbage is collected
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None  # the server is that of the parent
    executor._start_worker = partial(_start_worker, os.getpgrp())
    executor._take_part = partial(_take_part, os.getpgrp())
    fork_kernels()


def _start_worker(group: int, *arguments):
    with suppress(OSError): os.setpgid(0, group)
    START_WORKER(*arguments)


def _take_part(group: int, *arguments):
    with suppress(OSError): os.setpgid(0, group)
    TAKE_PART(*arguments)


@pytest.fixture(scope="module")
def forked_kernels():
    "Kernels of Jupyter are forked. A new one imports for 6 of the 7 CPU-seconds that it takes for a table."
    with pytest.MonkeyPatch.context() as patch:
        fork_kernels(patch.setattr)
        yield


def fork_kernels(patch=setattr):
    "Have kernels of Jupyter forked from now on; `patch`: that of a monkeypatch."
    from jupyter_client.provisioning import local_provisioner
    patch(local_provisioner, "launch_kernel", _launch_kernel)


def _launch_kernel(command, cwd=None, env=None, **options) -> Forked:
    assert command[1:3] == ["-m", "ipykernel_launcher"] and command[0] == sys.executable, command
    return Forked(_be_kernel, command[3:], cwd or os.getcwd(), dict(env))


def _be_kernel(arguments, folder, environment):
    import matplotlib
    import pandas
    from ipykernel.kernelapp import IPKernelApp
    os.environ.clear()
    os.environ |= {name: value for name, value in environment.items() if name != "JPY_PARENT_PID"}
    os.chdir(folder)
    threading.Thread(target=_end_with_parent, daemon=True).start()  # a kernel would ask for the parent by its id
    pandas.options.display.max_columns = 20  # what pandas finds when it is imported in a kernel, as the next line
    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    IPKernelApp.launch_instance(argv=arguments)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
