"""A wall clock that jumps, for one process: a library that is loaded before libc and shifts CLOCK_REALTIME.

Linux's time namespaces move only the monotonic clocks, which is what a gateway must not depend on anyway; libfaketime
does what this does. The shift in seconds stands in a file that is mapped into the process, so it can change while the
process runs.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *shift;
static int (*real_clock)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    real_clock = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("TEST_CLOCK_SHIFT");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) shift = page;
    close(file);
}

int clock_gettime(clockid_t id, struct timespec *told) {
    if (!real_clock) real_clock = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real_clock(id, told);
    if (!code && shift && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) told->tv_sec += *shift;
    return code;
}

int gettimeofday(struct timeval *restrict told, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    told->tv_sec = now.tv_sec;
    told->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *told) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told) *told = now.tv_sec;
    return now.tv_sec;
}
"""


class Clock:
    """The shifted clock of the processes that get `environment`; `folder` holds the library and the shift."""

    def __init__(self, folder: Path):
        self._file, self._library = folder / "shift", folder / "clock.so"
        source = folder / "clock.c"
        source.write_text(SOURCE)
        self.jump(0)
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(self._library), str(source), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)

    @staticmethod
    def possible() -> bool:
        """True when there is a C compiler to make it with."""
        return shutil.which("cc") is not None

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "TEST_CLOCK_SHIFT": str(self._file)}

    def jump(self, seconds: int) -> None:
        """The processes' wall clock is so many seconds off from now on."""
        if not self._file.exists():
            self._file.write_bytes(struct.pack("q", seconds))
        with self._file.open("r+b") as file:
            file.write(struct.pack("q", seconds))
