"""What can go wrong in the codec, as types; no logic lives here.

Every error of this package is a `CodecError`, carries what it knows as fields, and says in its message what happened,
what was there, what was wanted and what to do about it.
"""


class CodecError(Exception):
    """Root of all errors of the codec."""


class SpecError(CodecError):
    """An argument of our own side does not fit: a link's spec, a tensor's shape or dtype, a basis.

    Never the fault of a peer. Fields: `what`, `got`, `wanted`.
    """

    def __init__(
        self, what: str, got: object, wanted: object, advice: str = "correct the call or the run manifest"
    ) -> None:
        super().__init__(f"{what}: got {got}, wanted {wanted}; {advice}")
        self.what = what
        self.got = got
        self.wanted = wanted


class PacketError(CodecError):
    """A packet is malformed, damaged, or not the one that was expected here.

    Fields: `field` (the name of the first thing that was wrong), `got`, `wanted`.
    """

    def __init__(self, field: str, got: object, wanted: object, advice: str = "ask the sender for it again") -> None:
        super().__init__(f"packet {field}: got {got}, wanted {wanted}; {advice}")
        self.field = field
        self.got = got
        self.wanted = wanted


class BasisMismatch(CodecError):
    """A whole, undamaged packet was made with a basis that this side does not hold.

    Fields: `needed` (the version in the packet), `held` (ours, None when we hold none).
    """

    def __init__(self, needed: int, held: int | None) -> None:
        have = "no basis" if held is None else f"version {held}"
        super().__init__(f"packet needs basis version {needed}, have {have}; fetch that version and decode again")
        self.needed = needed
        self.held = held


class ReferenceMismatch(CodecError):
    """A whole, undamaged packet holds changes against references that this side does not hold.

    Fields: `needed` (the checksum of the sender's references), `held` (of ours, 0 when we hold none).
    """

    def __init__(self, needed: int, held: int) -> None:
        super().__init__(
            f"packet needs references {needed:#010x}, have {held:#010x}; ask the sender for the rows as a whole"
        )
        self.needed = needed
        self.held = held


class NonFiniteError(CodecError):
    """The sender's own tensor holds NaN, Inf, or numbers too large to be sent. Nothing was sent.

    Fields: `what`, `bad_values` (how many), `bad_rows` (in how many rows), `first_row` (index of the first one).
    """

    def __init__(self, what: str, bad_values: int, bad_rows: int, first_row: int) -> None:
        super().__init__(
            f"{what}: got {bad_values} values that are NaN, Inf or out of range, in {bad_rows} rows "
            f"(first: row {first_row}), wanted finite values; skip this tick and look at the loss"
        )
        self.what = what
        self.bad_values = bad_values
        self.bad_rows = bad_rows
        self.first_row = first_row
