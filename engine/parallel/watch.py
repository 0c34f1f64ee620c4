"""A rank that fails ends all ranks, its own error first.

Alone, a failing rank leaves the others waiting in a collective: with gloo until a connection breaks, with NCCL until
its watchdog's timeout, without a torchrun agent for ever. So each rank holds a TCP connection to a hub in rank 0's
process (``hub``), on which a thread waits, asleep until something comes:

- a rank that fails asks to speak; one may, prints its error, and then every rank ends with its exit code;
- a rank that dies without a word (SIGKILL, a crash, its machine) is noticed by its connection, and rank 0 says so;
- rank 0's death closes all connections, and one rank of each node says so.

The thread ends the process while the main thread waits in native code, which no exception reaches.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from engine import launch
from engine.errors import UserError
from engine.parallel.hub import Hub, keep_alive, send

_HUB_KEY = "mainspring/hub"
_REACH_SECONDS = 30.0  # until an address of rank 0 that does not answer is given up
_ANSWER_SECONDS = 12.0  # the hub's longest patience and the speaker's time
_watch: Watch | None = None
unreachable = False  # ``join`` has failed before


class Watch(threading.Thread):
    """This rank's connection to the hub. ``store``: a key-value store of this attempt's own, for torch's groups."""

    def __init__(self, connection: socket.socket, token: str, store: Store, hub: Hub | None):
        super().__init__(name="mainspring-watch", daemon=True)
        self.connection, self.store, self.hub = connection, store, hub
        self.left = False
        self._voice = False
        self._main = threading.main_thread().ident
        self._missed: list[str] = []
        self._may_speak = threading.Event()
        self._all_came, self._closed = threading.Event(), threading.Event()
        process = f"rank {launch.rank()} (host {socket.gethostname()}, process {os.getpid()})"
        send(connection, {"token": token, "rank": launch.rank(), "node": launch.node(), "process": process})
        os.register_at_fork(after_in_child=self._in_child)

    def _in_child(self) -> None:
        self.left = True
        self.connection.close()
        if self.hub is not None:
            self.hub.drop_connections()

    def run(self) -> None:
        with contextlib.suppress(OSError, ValueError), self.connection.makefile("rb") as lines:
            while not self.left and (line := lines.readline()):
                self._heed(json.loads(line))
        if not self.left:
            self._end("rank 0 ended without a word: it was killed (out of memory?) or crashed in native code", 1,
                      "error: " if self._voice else None)
        self._closed.set()

    def _heed(self, message: dict[str, Any]) -> None:
        if "voice" in message:
            self._voice = message["voice"]
        elif "where" in message:
            send(self.connection, {"place": place_of(sys._current_frames().get(self._main or 0))})
        elif "speak" in message:
            self._missed = message["speak"]
            self._may_speak.set()
        elif "all" in message:
            self._all_came.set()
        elif "closing" in message:
            self.left = True
        elif "end" in message:
            self._end(message["line"], message["end"], "stopped: " if message["tell"] else None)

    def _end(self, line: str, code: int, prefix: str | None) -> NoReturn:
        if prefix is not None:
            with contextlib.suppress(OSError, ValueError):
                print(prefix + line, file=sys.stderr, flush=True)
        os._exit(code)  # the main thread may wait for ranks that are gone, and so may destructors

    def wait_for_all(self, timeout_minutes: float) -> Store:
        """See ``arrive``. Rank 0 knows who is missing, and tells the others by failing."""
        if not self._all_came.wait(60 * timeout_minutes + (0 if self.hub else 10)):
            names = ", ".join(map(str, self.hub.absent())) if self.hub else "some"
            raise UserError(f"of {launch.world_size()} ranks, {names} did not come within {timeout_minutes:g} minutes "
                            "(parallel.timeout_minutes)", where=address(), fix="See their logs; all need the same "
                            "MASTER_ADDR, MASTER_PORT and WORLD_SIZE")
        return self.store

    def leave(self) -> None:
        """The rank is done: what ends from here on is no failure. Rank 0's leave ends the watch of all."""
        send(self.connection, {"bye": True})
        self._closed.wait(5)
        self.left = True
        if self.hub is not None:
            self.hub.join(5)

    def fail(self, text: str, line: str, code: int, *, kind: str, spoken: bool) -> NoReturn:
        """Says ``text`` if no other rank's error comes first, and ends all ranks."""
        send(self.connection, {"claim": {"kind": kind, "line": line, "code": code, "spoken": spoken}})
        if not spoken and self._may_speak.wait(_ANSWER_SECONDS):
            culprits = "".join(f"{process}; " for process in self._missed)
            print(text.replace("error: ", f"error: {culprits}", 1), file=sys.stderr, flush=True)
            send(self.connection, {"spoken": True})
        time.sleep(_ANSWER_SECONDS + 20)  # the hub's word ends the process
        os._exit(code)


def place_of(frame: Any) -> str:
    """The innermost place outside torch and the standard library: ``engine/data/loader.py:88 (micro_batches)``."""
    stack = traceback.extract_stack(frame) if frame is not None else []
    return place_in(stack)


def place_in(stack: traceback.StackSummary | list) -> str:
    ours = [entry for entry in stack if "site-packages" not in entry.filename and "lib/python" not in entry.filename]
    if not (ours or stack):
        return ""
    entry = (ours or stack)[-1]
    return f"{'/'.join(Path(entry.filename).parts[-3:])}:{entry.lineno} ({entry.name})"


def join(timeout_minutes: float) -> Watch | None:
    """Connects this rank to the hub, once; None for a single rank. Waits for rank 0 only.

    Raises ``UserError`` that names MASTER_ADDR:MASTER_PORT when rank 0 cannot be reached within the timeout.
    """
    global _watch, unreachable
    if _watch is None and launch.world_size() > 1:
        deadline = time.monotonic() + 60 * timeout_minutes
        try:
            store = _connect_store(timeout_minutes)
            hub, connection, token = _host(store) if launch.rank() == 0 else (None, *_reach(store, deadline))
        except UserError:
            unreachable = True
            raise
        keep_alive(connection)
        _watch = Watch(connection, token, PrefixStore(token, store), hub)
        _watch.start()
    return _watch


def joined() -> bool:
    return _watch is not None


def arrive(timeout_minutes: float) -> Store | None:
    """Waits for all ranks. -> a store of this attempt's own for torch's groups; None where ``join`` was not called.

    Raises ``UserError`` that says who has not come within the timeout.
    """
    return None if _watch is None else _watch.wait_for_all(timeout_minutes)


def leave() -> None:
    """The run is over: see ``Watch.leave``. Does nothing where ``join`` was not called."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None


def fail(text: str, line: str, code: int, *, kind: str, spoken: bool) -> NoReturn:
    """See ``Watch.fail``; after ``join``."""
    assert _watch is not None
    _watch.fail(text, line, code, kind=kind, spoken=spoken)


def address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _connect_store(timeout_minutes: float) -> Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT: torchrun's agent hosts it, or rank 0."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosting = launch.rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return TCPStore(host, port, launch.world_size(), hosting, datetime.timedelta(minutes=timeout_minutes),
                             wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError("the port is taken on this machine", where=address(),
                            fix="Set another MASTER_PORT (torchrun: --master-port, --rdzv-endpoint)") from error
        raise UserError(f"rank {launch.rank()} cannot reach rank 0 there", where=address(), fix=_REACHABLE) from error


_REACHABLE = ("Check that rank 0 was started, that MASTER_ADDR is its host's name or address, and that this machine "
              "may connect to it; with several networks, name the right one in GLOO_SOCKET_IFNAME and "
              "NCCL_SOCKET_IFNAME")


def _host(store: Store) -> tuple[Hub, socket.socket, str]:
    token = os.urandom(12).hex()
    hub = Hub(launch.world_size(), token)
    hub.start()
    connection = socket.create_connection(("localhost", hub.port), timeout=10)
    connection.settimeout(None)
    store.set(_HUB_KEY, json.dumps({"host": _own_address(), "port": hub.port, "token": token}))
    return hub, connection, token


def _own_address() -> str:
    """This host's address on the way to MASTER_ADDR, which is this host or the one of torchrun's first agent."""
    master = os.environ["MASTER_ADDR"]
    with contextlib.suppress(OSError):
        port = int(os.environ["MASTER_PORT"])
        family, kind, _, _, target = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            mine = probe.getsockname()[0]
        if not mine.startswith("127.") and mine != "::1":
            return mine
    return master


def _reach(store: Store, deadline: float) -> tuple[socket.socket, str]:
    """A connection to the hub, and its token.

    torchrun's store keeps the address of an attempt before this one: refused, it is read again.
    """
    refused = None
    while True:
        try:
            while not store.check([_HUB_KEY]):  # a wait that times out would print torch's warnings
                if time.monotonic() > deadline:
                    raise UserError("rank 0 did not come within the time limit (parallel.timeout_minutes): rank "
                                    f"{launch.rank()} waited there", where=address(), fix=_REACHABLE)
                time.sleep(0.1)
            hub = json.loads(store.get(_HUB_KEY))
            connection = socket.create_connection((hub["host"], hub["port"]), timeout=10)
            connection.settimeout(None)
            return connection, hub["token"]
        except (dist.DistError, RuntimeError) as error:
            raise UserError(f"rank 0 is gone: rank {launch.rank()} waited there", where=address(),
                            fix=_REACHABLE) from error
        except OSError as error:
            refused = refused or time.monotonic()
            if time.monotonic() > refused + _REACH_SECONDS:
                raise UserError(f"rank {launch.rank()} cannot connect to rank 0 at {hub['host']}:{hub['port']} "
                                f"({error.strerror or error})", where=address(), fix=_REACHABLE) from error
            time.sleep(0.2)
