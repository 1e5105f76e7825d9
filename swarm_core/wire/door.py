"""Who may open a stream at a server, and how many: strikes, quarantine, caps. Pure counts by peer; no stream, no clock.

A peer is a string: the identity in its certificate where it has one, else its address without the port, and the call.
Peers on loopback without an identity share one address: the strikes of one would be those of all, so they are refused
frame by frame and never shut out.
"""

from __future__ import annotations

import logging
from collections import Counter

from swarm_core.wire.errors import BadFrame, Crowded, Nameless, Quarantined, Refused

MOST_STRIKES = 3  # one may be a bug or a damaged disk, two may be a restart into it
MOST_STREAMS = 32  # of one peer and call: a host's workers, behind one address
MOST_WAITING = 64  # streams of all peers that have not said HELLO; each holds a connection and a chunk
HELLO_S = 30.0  # until HELLO: ten round trips of a bad line, and a worker that is short of CPU
HELLO_LIMIT = 64 << 10  # bytes of a stream's first frame; a Hello has 1 KB
log = logging.getLogger(__name__)


class Door:
    """One server's. `enter`, then `greeted` with the first frame, then `leave`, each once a stream."""

    def __init__(self) -> None:
        self._strikes: Counter[str] = Counter()
        self._streams: Counter[str] = Counter()
        self._waiting = 0

    def begin_epoch(self) -> None:
        """What was before is forgiven."""
        self._strikes.clear()

    def enter(self, peer: str) -> None:
        """A stream opens; "" is a peer that cannot be told from others. Raises Quarantined, Crowded."""
        if self._strikes[peer] >= MOST_STRIKES:
            raise Quarantined(f"{peer} has sent {self._strikes[peer]} bad frames and is shut out until the next epoch")
        if peer and self._streams[peer] >= MOST_STREAMS:
            raise Crowded(f"{peer} has {self._streams[peer]} streams open; at most {MOST_STREAMS}: close some first")
        if self._waiting >= MOST_WAITING:
            raise Crowded(
                f"{self._waiting} streams have not said who they are; at most {MOST_WAITING}: try again later"
            )
        self._streams[peer] += 1
        self._waiting += 1

    def greeted(self) -> None:
        """A stream that had entered has sent its first frame."""
        self._waiting -= 1

    def leave(self, peer: str, greeted: bool) -> None:
        """A stream that had entered is over."""
        self._waiting -= not greeted
        self._streams[peer] -= 1
        if not self._streams[peer]:
            del self._streams[peer]

    def refused(self, peer: str, error: Refused) -> None:
        """A stream ended with this refusal. Only a frame that no correct peer sends is a strike: that a place is taken,
        another manifest or an epoch that is over happens to honest peers."""
        if not peer or not isinstance(error, BadFrame) or isinstance(error, (Quarantined, Crowded, Nameless)):
            return
        self._strikes[peer] += 1
        log.warning("%s, strike %d of %d: %s", peer, self._strikes[peer], MOST_STRIKES, error)
