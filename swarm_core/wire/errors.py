"""What can go wrong between two processes, and which gRPC status each error travels as. Nothing here opens a connection."""

from __future__ import annotations

import grpc

from swarm_core.errors import KedgeError, UserError

LONGEST_TEXT = 2000  # letters; a gRPC trailer has 8 KiB


class WireError(KedgeError):
    """Root of everything that goes wrong between processes; `str(error)` is one readable line.

    It may quote what a peer sent, and stands in logs, terminals and trailers: so whatever is no letter becomes a space,
    and what is beyond LONGEST_TEXT is cut off.
    """

    def __init__(self, text: str = "") -> None:
        short = text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 3] + "..."
        super().__init__("".join(letter if letter.isprintable() else " " for letter in short))


class Unreachable(WireError, UserError):
    """Nobody answered at an address within the time given."""

    def __init__(self, who: str, address: str, waited_s: float, detail: str = "") -> None:
        super().__init__(
            f"{who} at {address} did not answer within {waited_s:.0f} s{f' ({detail})' if detail else ''}: "
            f"check that it runs, that the address is right and that a firewall lets TCP through"
        )
        self.address = address
        self.waited_s = waited_s


class BadAddress(WireError, UserError):
    """Not HOST:PORT."""

    def __init__(self, address: str) -> None:
        super().__init__(f"{address!r} is not an address: wanted HOST:PORT, such as anchor.example.org:7400")
        self.address = address


class PeerLost(WireError):
    """An open stream to a peer broke."""


class AnchorAway(PeerLost):
    """The anchor was away for too long, and nothing can be finished without it."""


class Silent(PeerLost):
    """A peer whose stream stands has said nothing for too long: it is frozen or cut off."""


class PortInUse(WireError, UserError):
    """The address asked for cannot be bound."""

    def __init__(self, address: str, detail: str) -> None:
        super().__init__(f"cannot listen on {address} ({detail}): choose another --listen, or port 0 for any free one")
        self.address = address


class Refused(WireError):
    """The peer refused us, with its reason. Subclasses say which status it travels as."""


class StageTaken(Refused, UserError):
    """Another worker already holds this stage."""


class StageOutOfRange(Refused, UserError):
    """The stage number does not exist in this swarm."""


class ManifestMismatch(Refused, UserError):
    """The two ends do not run the same manifest or protocol."""


class StaleEpoch(Refused):
    """The frame belongs to an epoch or attempt that is over."""


class NothingHeld(Refused, UserError):
    """A stage came into a run at work with nothing that the others could go on from."""


class Unauthenticated(Refused, UserError):
    """No certificate, or one that does not hold: expired, of another authority, a token that was used."""


class NotAllowed(Refused, UserError):
    """A certificate that holds, of somebody who may not do this."""


class Unencrypted(WireError, UserError):
    """An address that others can reach was to be served to whoever comes."""

    def __init__(self, address: str) -> None:
        super().__init__(
            f"{address} can be reached from other machines, and nothing would be encrypted: keep to 127.0.0.1, or give "
            f"--token (`anchor_node token create` on the anchor's machine makes one), or --trusted-network where nobody "
            f"else is on the network"
        )
        self.address = address


class BadFrame(Refused):
    """A frame that no correct peer sends: malformed, too large, a wrong checksum, or not expected here."""


class Quarantined(BadFrame):
    """The peer has sent too many bad frames in this epoch; nothing more of it is read."""


class Crowded(BadFrame):
    """The peer, or all of them together, have as many streams open as a server takes."""


class Nameless(BadFrame):
    """A stream was opened, and nobody said who is there."""


# The one table of error <-> status. ABORTED and FAILED_PRECONDITION are ours alone: gRPC itself never emits them.
STATUS_OF: dict[type[Refused], grpc.StatusCode] = {
    StageTaken: grpc.StatusCode.ALREADY_EXISTS,
    StageOutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    ManifestMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    StaleEpoch: grpc.StatusCode.ABORTED,
    NothingHeld: grpc.StatusCode.NOT_FOUND,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    BadFrame: grpc.StatusCode.INVALID_ARGUMENT,
}
ERROR_OF: dict[grpc.StatusCode, type[Refused]] = {status: error for error, status in STATUS_OF.items()}


def status_of(error: Refused) -> grpc.StatusCode:
    """The status an error travels as: the table's for its class, or for the nearest class it is derived from."""
    return next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)


def from_status(code: grpc.StatusCode, details: str, peer: str) -> WireError:
    """The typed error for a status that a call ended with."""
    if code in ERROR_OF:
        return ERROR_OF[code](details)
    return PeerLost(f"the stream to {peer} broke: {code.name} {details}".strip())
