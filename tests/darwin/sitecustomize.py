"""Makes every Python process that has this folder on its path believe that it runs on macOS.

    PYTHONPATH=tests/darwin python -m pytest tests/test_prepare.py

What macOS lacks is deleted for everyone. What only names the system does so for the modules in
`_TOLD`: torch and others load Linux libraries by it. It tells nothing about Apple's kernels, file
systems (names in any case, sleep, purgeable space) or GPU.
"""

import signal

_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # no traceback from here

import errno  # noqa: E402
import fcntl  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
import selectors  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402

_OURS = ("sota_transformer", "train_sota", "__main__", "tests")
_TOLD = (*_OURS, "multiprocessing", "concurrent", "tempfile", "uvicorn")
_FULLFSYNC = 51
_GONE = {
    os: "O_DIRECT O_NOATIME O_PATH O_RSYNC O_TMPFILE copy_file_range eventfd fdatasync getrandom "
    "getresgid getresuid getxattr listxattr memfd_create pidfd_open pipe2 posix_fadvise "
    "posix_fallocate removexattr sched_getaffinity sched_setaffinity sendfile setresgid setresuid "
    "setxattr splice waitid",
    signal: "SIGCLD SIGPOLL SIGPWR SIGRTMAX SIGRTMIN SIGSTKFLT pidfd_send_signal sigtimedwait "
    "sigwaitinfo",
    time: "CLOCK_BOOTTIME CLOCK_TAI clock_settime pthread_getcpuclockid",
    resource: "RLIMIT_MSGQUEUE RLIMIT_SIGPENDING RUSAGE_THREAD prlimit",
}


def _caller(depth: int) -> str:
    """The top package of the module that asks, whoever of the standard library opens it a file."""
    frame = sys._getframe(depth + 1)
    while frame.f_back and frame.f_globals.get("__name__") in ("pathlib", "io", "codecs"):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").partition(".")[0]


class _Sys(ModuleType):
    @property
    def platform(self) -> str:
        real = vars(self)["platform"]  # unless a test has set another
        return "darwin" if real == "linux" and _caller(1) in _TOLD else real

    @platform.setter
    def platform(self, value: str) -> None:
        vars(self)["platform"] = value


def _say(name: str, answer: Any) -> None:
    """Let `platform` give this answer to those who are told."""
    real = getattr(platform, name)
    setattr(platform, name, lambda *a: answer if _caller(1) in _TOLD else real(*a))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """There is no /proc and no /sys for us. (/dev/fd exists on both, and leads to /proc here.)"""
    if event not in ("open", "os.listdir", "os.scandir"):
        return
    path = arguments[0]
    if isinstance(path, str | bytes | os.PathLike) and _caller(1) in _TOLD[:2]:
        text = os.fsdecode(path)
        if text.startswith(("/proc/", "/sys/")):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text)


def _fcntl(descriptor: Any, command: int, argument: Any = 0) -> Any:
    if command != _FULLFSYNC:
        return _real_fcntl(descriptor, command, argument)
    if refusal := os.environ.get("NO_FULLFSYNC"):  # ENOTSUP, say, as on a network drive
        number = getattr(errno, refusal)
        raise OSError(number, os.strerror(number))
    return _fsync(descriptor)


def _getrusage(who: int) -> Any:
    usage = list(_real_getrusage(who))
    usage[2] *= 1024  # ru_maxrss is in bytes there
    return resource.struct_rusage(usage)


sys.__class__ = _Sys
for _module, _names in _GONE.items():
    for _name in _names.split():
        vars(_module).pop(_name, None)
selectors.DefaultSelector = selectors.PollSelector  # type: ignore[misc]
for _name, _answer in (("system", "Darwin"), ("machine", "arm64"), ("processor", "arm")):
    _say(_name, _answer)
_say("mac_ver", ("14.6.1", ("", "", ""), "arm64"))
_fsync, _real_fcntl, _real_getrusage = os.fsync, fcntl.fcntl, resource.getrusage
fcntl.F_FULLFSYNC, fcntl.fcntl = _FULLFSYNC, _fcntl  # type: ignore[misc]
resource.getrusage = _getrusage
sys.addaudithook(_refuse)
signal.pthread_sigmask(signal.SIG_SETMASK, _mask)
