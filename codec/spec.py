"""What one link does to its rows, and what that costs in bytes: pure functions of integers; no torch here.

The planner, the ledger and the receiver's checks all ask here for sizes, without having a tensor.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from codec.errors import SpecError
from codec.header import HEADER_BYTES, UINT32_MAX, Direction, Element, Kind

__all__ = ["Direction", "LinkSpec", "dense_bytes", "packet_bytes", "payload_bytes"]

KindName = Literal["identity", "none", "lowrank"]
BackwardName = Literal["straight_through", "exact"]
ZstdName = Literal["auto", "off"]
DtypeName = Literal["fp32", "fp64"]

MAX_WIDTH: Final = 1 << 16  # above any model's hidden width; `link_codec`'s bound on coefficients relies on it


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """One boundary between two stages: how rows of `width` numbers cross it.

    kind           `identity`: the rows as they are, bit for bit. `none`: the rows in bf16, the dense baseline.
                   `lowrank`: `rank_forward` bf16 coefficients a row forward, and backward according to `backward`.
    backward       (lowrank) `straight_through`: gradients have their own basis Q_b of `rank_backward`.
                   `exact`: the gradient of the compressed network, on the forward basis Q_f at `rank_forward`.
    zstd           `auto`: payloads are compressed while it saves; `off`: packets have exactly `packet_bytes`.
    dtype          the element type that `identity` carries; `fp64` is for tests in float64.

    The two ranks mean nothing, and are not looked at, unless kind is `lowrank`. Raises `SpecError`.
    """

    kind: KindName
    width: int
    rank_forward: int = 0
    rank_backward: int = 0
    backward: BackwardName = "straight_through"
    zstd: ZstdName = "auto"
    dtype: DtypeName = "fp32"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, get_args(KindName)),
            ("backward", self.backward, get_args(BackwardName)),
            ("zstd", self.zstd, get_args(ZstdName)),
            ("dtype", self.dtype, get_args(DtypeName)),
        ):
            if value not in known:
                raise SpecError(f"link {name}", repr(value), "one of " + ", ".join(known))
        _check_int("link width", self.width, 1, MAX_WIDTH)
        if self.kind != "identity" and self.dtype != "fp32":
            raise SpecError("link dtype", self.dtype, f"fp32, as kind {self.kind} carries bf16 and is rebuilt in fp32")
        if self.kind == "lowrank":
            _check_int("link rank_forward", self.rank_forward, 1, self.width)
            if self.backward == "straight_through":
                _check_int("link rank_backward", self.rank_backward, 1, self.width)

    @property
    def element(self) -> Element:
        """The type of the numbers that travel."""
        if self.kind == "identity":
            return Element.FP64 if self.dtype == "fp64" else Element.FP32
        return Element.BF16

    @property
    def wire_kind(self) -> Kind:
        return Kind[self.kind.upper()]

    def basis_direction(self, direction: Direction) -> Direction | None:
        """Whose basis this direction uses: FORWARD for Q_f, BACKWARD for Q_b, None where no basis is used."""
        if self.kind != "lowrank":
            return None
        return Direction.FORWARD if self.backward == "exact" else direction

    def columns(self, direction: Direction) -> int:
        """Numbers sent per row."""
        basis_direction = self.basis_direction(direction)
        if basis_direction is None:
            return self.width
        return self.rank_forward if basis_direction == Direction.FORWARD else self.rank_backward


def payload_bytes(spec: LinkSpec, direction: Direction, rows: int) -> int:
    """Bytes of the numbers of `rows` rows, before zstd. Raises `SpecError` if one packet cannot hold them."""
    _check_int("packet rows", rows, 0, UINT32_MAX)
    size = rows * spec.columns(direction) * spec.element.bytes
    if size > UINT32_MAX:
        raise SpecError("packet payload", f"{size} bytes", f"at most {UINT32_MAX}", "use smaller microbatches")
    return size


def packet_bytes(spec: LinkSpec, direction: Direction, rows: int) -> int:
    """Bytes of a packet, header included: exact with zstd `off`, never exceeded with `auto`."""
    return HEADER_BYTES + payload_bytes(spec, direction, rows)


def dense_bytes(width: int, rows: int) -> int:
    """Bytes that bf16 rows would have cost: what every compression ratio is stated against."""
    _check_int("link width", width, 1, MAX_WIDTH)
    _check_int("packet rows", rows, 0, UINT32_MAX)
    return Element.BF16.bytes * rows * width


def _check_int(what: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SpecError(what, value, f"an integer in {low}..{high}")
