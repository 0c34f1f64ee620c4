"""Where failures meet: a thread in rank 0's process to which every rank holds one TCP connection (see ``watch``).

The kernel closes the connection of a process that dies, whatever ended it, and keep-alives find a machine that is gone,
so nothing polls: the thread sleeps until something happens. Ranks that fail claim to speak. One of them may; when it
has spoken, all ranks are told to end. Messages are lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

# Seconds that a claim waits for a better one. An error of a rank's own is the cause; one that says that a collective
# broke or timed out is likely a consequence, and its cause may still be on its way.
PATIENCE = {"own": 0.3, "collective": 2.0}
_SPEAKING_SECONDS = 5.0  # for the chosen rank to print
LINGER_SECONDS = 60.0  # after the start: for ranks that are slower to come, when one has failed before


def keep_alive(connection: socket.socket) -> None:
    """A peer whose machine is gone is noticed after 20 seconds of silence, by the kernel."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 8), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20_000)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a peer that is gone needs no message
        connection.sendall(json.dumps(message).encode() + b"\n")


@dataclass
class _Member:
    connection: socket.socket
    rank: int = -1  # until it has said hello
    node: str = ""
    process: str = ""  # "rank 3 (host gpu7, process 123)"
    left: bool = False  # it ended as it should
    place: str = ""  # where its main thread is, when asked
    rest: bytes = b""


@dataclass
class _Claim:
    rank: int
    kind: str  # own, collective
    line: str
    code: int
    spoken: bool = False
    died: bool = False  # without a word: rank 0 speaks for it
    since: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> float:
        return self.since + (0.0 if self.spoken else PATIENCE[self.kind])


class Hub(threading.Thread):
    """Listens on ``port`` (any interface) for the ``world_size`` ranks that know ``token``."""

    def __init__(self, world_size: int, token: str):
        super().__init__(name="mainspring-hub", daemon=True)
        self.world_size, self.token = world_size, token
        if socket.has_dualstack_ipv6():
            self.listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        else:
            self.listener = socket.create_server(("", 0), backlog=4096)
        self.port: int = self.listener.getsockname()[1]
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.members: list[_Member] = []
        self.nodes: dict[int, str] = {}  # of every rank that has ever come
        self.began = time.monotonic()
        self.claims: list[_Claim] = []
        self.chosen: _Claim | None = None
        self.chosen_at = 0.0
        self.over: dict[str, Any] | None = None  # what every rank is told when one has failed
        self.closing = False

    def drop_connections(self) -> None:
        """In a forked child: gives up the parent's connections, so that its death still closes them."""
        for connection in (self.listener, *(member.connection for member in self.members)):
            connection.close()

    def run(self) -> None:
        while not self.closing:
            self._wait(self._next_deadline())
            if self.over is None:
                self._judge()
        for member in self.members:
            send(member.connection, {"closing": True})
            member.connection.close()
        self.listener.close()

    def _wait(self, seconds: float | None) -> None:
        for key, _ in self.selector.select(seconds):
            if key.data is None:
                self._accept()
            else:
                self._receive(key.data)

    def _next_deadline(self) -> float | None:
        if self.over is not None or not self.claims:
            return None
        due = self.chosen_at + _SPEAKING_SECONDS if self.chosen else min(claim.due for claim in self.claims)
        return max(0.0, due - time.monotonic())

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it may have gone again
            connection, _ = self.listener.accept()
            keep_alive(connection)
            self.members.append(_Member(connection))
            self.selector.register(connection, selectors.EVENT_READ, self.members[-1])

    def _receive(self, member: _Member) -> None:
        try:
            data = member.connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._lost(member)
            return
        *lines, member.rest = (member.rest + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict) or (member.rank < 0 and message.get("token") != self.token):
                self._forget(member)  # somebody else's connection
                return
            self._heed(member, message)

    def _forget(self, member: _Member) -> None:
        self.selector.unregister(member.connection)
        self.members.remove(member)
        member.connection.close()

    def _lost(self, member: _Member) -> None:
        self._forget(member)
        if member.rank < 0 or member.left or self.over is not None:
            return
        claim = next((claim for claim in self.claims if claim.rank == member.rank), None)
        if claim is None:
            claim = _Claim(member.rank, "own", "ended without a word: it was killed (out of memory?) or crashed in "
                           "native code; its machine's kernel log may say more", 1, died=True)
            self.claims.append(claim)
            if self.chosen is None:  # at once: a torchrun agent that saw it die ends this process within 0.1 seconds
                print(f"error: {member.process} {claim.line}", file=sys.stderr, flush=True)
                self.chosen, self.chosen_at = claim, time.monotonic()
        claim.spoken = True

    def _heed(self, member: _Member, message: dict[str, Any]) -> None:
        if "token" in message:
            member.rank, member.node, member.process = message["rank"], message["node"], message["process"]
            others = {node for rank, node in self.nodes.items() if rank}
            self.nodes[member.rank] = member.node
            send(member.connection, {"voice": member.rank > 0 and member.node not in others})
            if self.over is not None:
                send(member.connection, self.over)
            elif len(self.nodes) == self.world_size:
                for each in self.members:
                    send(each.connection, {"all": True})
        elif "claim" in message:
            self.claims.append(_Claim(member.rank, **message["claim"]))
            if message["claim"]["kind"] == "collective":
                for other in self.members:
                    send(other.connection, {"where": True})
        elif "place" in message:
            member.place = message["place"]
        elif "spoken" in message and self.chosen is not None:
            self.chosen.spoken = True
        elif "bye" in message:
            member.left = True
            self.closing = self.closing or member.rank == 0
            send(member.connection, {"closing": True})

    def _judge(self) -> None:
        """Lets one rank speak, and ends all when it has."""
        now = time.monotonic()
        if self.chosen is None and self.claims and now >= min(claim.due for claim in self.claims):
            self.chosen, self.chosen_at = self._root(), now
            speaker = next((m for m in self.members if m.rank == self.chosen.rank), None)
            if speaker is None:
                self.chosen.spoken = True
            elif not self.chosen.spoken:
                send(speaker.connection, {"speak": self._missed() if self.chosen.kind == "collective" else []})
        if self.chosen is not None and (self.chosen.spoken or now >= self.chosen_at + _SPEAKING_SECONDS):
            self._end(self.chosen)

    def _root(self) -> _Claim:
        """The first error of a rank's own, else the first consequence; rank 0's, where all say the same."""
        first = min(self.claims, key=lambda claim: (not claim.spoken, claim.kind != "own", claim.since))
        return min((claim for claim in self.claims if claim.line == first.line), key=lambda claim: claim.rank)

    def _missed(self) -> list[str]:
        """Where the ranks are that did not take part in what the others waited for."""
        claimed = {claim.rank for claim in self.claims}
        return [f"{m.process} is at {m.place}" if m.place else f"{m.process} does not answer"
                for m in sorted(self.members, key=lambda m: m.rank)
                if m.rank >= 0 and not m.left and m.rank not in claimed]

    def _end(self, claim: _Claim) -> None:
        """Tells every rank. Rank 0 last, since this thread ends with it, and late where others have yet to come."""
        told = {self.nodes.get(0 if claim.died else claim.rank)}  # nodes whose log has a line of it
        self.over = {"end": claim.code, "line": f"rank {claim.rank}: {claim.line}", "tell": False}
        for member in sorted(self.members, key=lambda m: m.rank):
            if member.rank > 0:
                send(member.connection, self.over | {"tell": member.node not in told})
                told.add(member.node)
        while len(self.nodes) < self.world_size and time.monotonic() < self.began + LINGER_SECONDS:
            self._wait(0.2)
        for member in self.members:
            if member.rank == 0:
                send(member.connection, self.over | {"tell": member.node not in told})

    def absent(self) -> list[int]:
        """The ranks that have not come."""
        return sorted(set(range(self.world_size)) - set(self.nodes))
