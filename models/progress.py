"""Progress: a bar on a terminal, now and then a line where stderr is a file."""
import errno
import io
import math
import os
import select
import sys
from collections.abc import Iterable
from contextlib import suppress

from tqdm import tqdm


class Output(io.FileIO):
    """stdout or stderr in a file, whose disk may be full: what does not fit there is lost, and the run goes on."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return len(data)


def outlive_full_logs() -> None:
    """From now on no line for a log ends the process because the log's disk is full."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper and not stream.isatty():  # and not what captures it, as pytest does
            stream.flush()
            output = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(output, stream.encoding, stream.errors, line_buffering=True))


class Lines:
    """What tqdm writes to; makes each drawing of its bar a line of stderr."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def bar(items: Iterable | None = None, total: int | None = None, unit: str = "it", initial: int = 0,
        disable: bool = False, label: str | None = None) -> tqdm:
    """tqdm's bar over `items`, or to be updated up to `total`. Into a file it writes a line when 10 s have gone
    by and a hundredth of the work is done."""
    if sys.stderr.isatty():
        return tqdm(items, label, total, unit=unit, initial=initial, disable=disable, dynamic_ncols=True)
    total = len(items) if total is None else total
    line = "{desc}{n_fmt}/{total_fmt} {unit} in {elapsed}, {remaining} left, {rate_fmt}{postfix}"
    return tqdm(items, label, total, unit=unit, initial=initial, disable=disable, file=Lines(), position=0,
                bar_format=line, mininterval=10, maxinterval=math.inf, miniters=max(1, total // 100))


def end_bars() -> None:
    """Leave the open bars as they are, so that what is printed next has a line to itself."""
    for open_bar in list(getattr(tqdm, "_instances", ())):
        open_bar.close()


def drop_closed_streams() -> None:
    """Where the terminal was closed, or what read a pipe has ended, the output goes nowhere from now on: a write
    would end the process."""
    for stream in (1, 2):
        poll = select.poll()
        poll.register(stream, select.POLLOUT)
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def tell(line: str) -> None:
    """A line on stderr out of a signal's handler: not by print, which may be at work at this moment."""
    drop_closed_streams()
    with suppress(OSError):  # of a full disk, in the middle of an update
        os.write(2, ("\n" * sys.stderr.isatty() + line).encode())
