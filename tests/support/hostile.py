"""What tests of hostile files share: limits on memory and time, absurd values, files in the safetensors format."""

from __future__ import annotations

import json
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


# No example may take more memory than this, nor longer than a hang would; neither is a measurement.
MOST_MEMORY = 2**29
HANG = 20
# Exponential in the length of a name that they do not match.
HOSTILE = [r"(([a-z0-9_]+\.?)+)+!", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(.*.*.*.*.*)*!", r"(a|a|b)*(([^.]+)*\.*)*!"]
ABSURD = [-1, 0, 2, 10**9, 10**12, 2**31, 2**62, 2**63, 2**64, 10**30, 1.0, 1e9, 1e300, True, None, "1", [1]]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from([*ABSURD, *HOSTILE, "conv_in", "conv_in.weight", "class_embedding", "all-linear", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


class HangError(BaseException):
    """Not an Exception: what is under test turns those into a ValueError."""


@contextmanager
def guarded() -> Iterator[None]:
    """What takes absurd amounts of memory fails, in place of the machine; and `signal.alarm(HANG)` ends what hangs."""

    def hangs(*_):
        raise HangError

    before = signal.signal(signal.SIGALRM, hangs)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.is_file():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded() -> Iterator[None]:
    """One try: it may neither hang nor take more than MOST_MEMORY; inside `guarded`."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
    taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
    assert taken < MOST_MEMORY


def examples(count):
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


# Files in the safetensors format, sound or not, by the format's description and without the library.


def pack(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def unpack(content):
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]
