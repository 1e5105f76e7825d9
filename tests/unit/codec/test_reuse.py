"""Only changes travel on the next pass, both ends always hold the same, and who has lost it says so before using it."""

import pytest
import torch
from torch import Tensor

from codec.basis import Basis
from codec.errors import NonFiniteError, PacketError, ReferenceMismatch, SpecError
from codec.fit import orthonormalise
from codec.link_codec import LinkCodec
from codec.reuse import ReuseStore
from codec.spec import Direction, LinkSpec

FORWARD, BACKWARD = Direction
WIDTH, RANK, ROWS = 32, 8, 120
SPEC = LinkSpec("lowrank", WIDTH, RANK, RANK, quantiser_forward="uniform", reuse=True)
KEYS = ((11, 50), (-7, 40), (2**40, 30))


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BASIS = Basis.orthonormal(3, orthonormalise(seeded(WIDTH, RANK)), 0.1)
X_NH = seeded(ROWS, WIDTH, seed=1)


class Link:
    """Two ends, each with its own codec and store."""

    def __init__(self, spec: LinkSpec = SPEC, limit_bytes: int = 1 << 20) -> None:
        self.codec, self.far = LinkCodec(spec), LinkCodec(spec)
        self.sender, self.receiver = ReuseStore(limit_bytes), ReuseStore(limit_bytes)
        self.sent_bytes: dict[object, int] = {}  # of packets with changes, which the sender holds on to

    def send(
        self, x_NH: Tensor, keys: tuple[tuple[int, int], ...] = KEYS, basis: Basis = BASIS
    ) -> tuple[bytes, Tensor]:
        packet = self.codec.encode(x_NH, FORWARD, basis, rows=self.sender.rows(keys))
        arrived_NH = self.far.decode(packet, len(x_NH), FORWARD, basis, rows=self.receiver.rows(keys))
        self.sent_bytes[keys] = len(self.sender.rows(keys).held() or b"")
        assert self.sender.held_bytes == self.receiver.held_bytes + sum(self.sent_bytes.values())
        return packet, arrived_NH

    def settle(self, keep: bool = True) -> None:
        self.sender.settle(keep)
        self.receiver.settle(keep)
        self.sent_bytes.clear()


@pytest.fixture
def link() -> Link:
    """A link on which the rows of X have crossed once."""
    made = Link()
    made.send(X_NH)
    made.settle()
    return made


def test_unchanged_rows_cost_next_to_nothing_and_arrive_as_before(link: Link) -> None:
    first_NH = LinkCodec(SPEC).project(X_NH, FORWARD, BASIS)
    packet, arrived_NH = link.send(X_NH)
    assert len(packet) < 47 + 40
    assert torch.equal(arrived_NH, first_NH)


def test_other_microbatches_of_the_same_samples_lose_nothing(link: Link) -> None:
    whole, _ = Link().send(X_NH)
    for keys, rows in (
        ((KEYS[2],), slice(90, 120)),
        (KEYS[:2], slice(0, 90)),
        (KEYS[1::-1], [*range(50, 90), *range(50)]),
    ):
        packet, arrived_NH = link.send(X_NH[rows], keys)
        assert len(packet) < len(whole) / 4
        assert torch.equal(arrived_NH, LinkCodec(SPEC).project(X_NH, FORWARD, BASIS)[rows])


def test_changes_are_exact_on_the_grid_and_do_not_add_up(link: Link) -> None:
    """Each pass is as near to its rows as the first: |y' - y| <= s step / 2 with the first pass' scale s."""
    whole, _ = Link().send(X_NH)
    x_NH, y_NR = X_NH.clone(), X_NH @ BASIS.encoder_HR
    scale_N = X_NH.square().mean(dim=1).sqrt()
    for turn in range(6):
        x_NH = x_NH + 0.01 * seeded(ROWS, WIDTH, seed=turn + 5)
        packet, arrived_NH = link.send(x_NH)
        link.settle()
        assert len(packet) < 0.75 * len(whole)
        y_NR = x_NH @ BASIS.encoder_HR
        assert ((arrived_NH @ BASIS.encoder_HR - y_NR).abs() <= scale_N[:, None] * 2**0.125 * 0.05 + 1e-5).all()


def test_samples_without_reference_travel_whole_in_the_same_packet(link: Link) -> None:
    keys = (KEYS[0], (99, 20), KEYS[2])
    x_NH = torch.cat((X_NH[:50], seeded(20, WIDTH, seed=9), X_NH[90:]))
    packet, arrived_NH = link.send(x_NH, keys)
    assert torch.equal(arrived_NH, LinkCodec(SPEC).project(x_NH, FORWARD, BASIS))
    alone, _ = Link().send(x_NH[50:70], ((99, 20),))
    assert len(packet) < len(alone) + 40


def test_a_dropped_round_leaves_the_references_untouched(link: Link) -> None:
    state = {name: tensor.clone() for name, tensor in link.sender.state().items()}
    first, _ = link.send(X_NH + 0.1)
    link.settle(keep=False)
    assert link.sender.state().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in link.sender.state().items())
    again, _ = link.send(X_NH + 0.1)
    assert again == first


def test_a_receiver_without_the_references_says_so_and_stages_nothing(link: Link) -> None:
    packet = link.codec.encode(X_NH, FORWARD, BASIS, rows=link.sender.rows(KEYS))
    other = Link()
    other.send(X_NH + 1.0)
    other.settle()
    for store in (ReuseStore(1 << 20), other.receiver):
        held = store.held_bytes
        with pytest.raises(ReferenceMismatch) as caught:
            link.far.decode(packet, ROWS, FORWARD, BASIS, rows=store.rows(KEYS))
        assert caught.value.needed != caught.value.held and store.held_bytes == held
    with pytest.raises(ReferenceMismatch):
        link.far.decode(packet, ROWS, FORWARD, BASIS)
    with pytest.raises(ReferenceMismatch):
        link.far.decode(packet, ROWS, FORWARD, BASIS, rows=link.receiver.rows(KEYS[::-1]))


@pytest.mark.parametrize("outliers", [0.0, 6.0])
def test_the_whole_packet_gives_the_same_values_and_the_same_references(outliers: float) -> None:
    spec = LinkSpec("lowrank", WIDTH, RANK, RANK, quantiser_forward="uniform", reuse=True, outliers=outliers)
    x_NH = X_NH.clone()
    x_NH[17] *= 40.0  # an outlier, or a row whose integers need two bytes
    link = Link(spec)
    link.send(x_NH)
    link.settle()
    changed_NH = x_NH + 0.02 * seeded(ROWS, WIDTH, seed=3)
    packet, arrived_NH = link.send(changed_NH)
    whole = link.codec.encode_whole(link.sender.rows(KEYS), BASIS)
    lost = ReuseStore(1 << 20)
    assert torch.equal(link.far.decode(whole, ROWS, FORWARD, BASIS, rows=lost.rows(KEYS)), arrived_NH)
    assert len(whole) > len(packet)
    if outliers:
        assert torch.equal(arrived_NH[17], changed_NH[17])
    link.settle()
    lost.settle(keep=True)
    third = link.codec.encode(changed_NH, FORWARD, BASIS, rows=link.sender.rows(KEYS))
    assert torch.equal(link.far.decode(third, ROWS, FORWARD, BASIS, rows=lost.rows(KEYS)), arrived_NH)
    with pytest.raises(SpecError, match="no packet with changes"):
        link.codec.encode_whole(link.sender.rows(KEYS[:1]), BASIS)


def test_forgetting_and_another_basis_end_all_references(link: Link) -> None:
    newer = Basis.orthonormal(4, BASIS.encoder_HR, BASIS.step)
    whole, _ = Link().send(X_NH, basis=newer)
    assert link.send(X_NH, basis=newer)[0] == whole
    link.settle(keep=False)
    link.sender.forget()
    link.receiver.forget()
    assert link.sender.held_bytes == link.receiver.held_bytes == 0
    assert link.send(X_NH)[0] == Link().send(X_NH)[0]


def test_memory_is_bounded_and_both_ends_keep_the_same() -> None:
    """Samples take a byte a coefficient and two a row; what does not fit is not kept, and still travels."""
    sample = {key: rows * (RANK + 2) for key, rows in KEYS}
    limit = 3 * (sample[-7] + sample[11])  # a third for references: the last key does not fit beside the others
    link = Link(limit_bytes=limit)
    for _ in range(3):
        link.send(X_NH)
        assert link.sender.held_bytes <= limit
        link.settle()
        assert link.sender.held_bytes == link.receiver.held_bytes == sample[-7] + sample[11]
    assert {name.split(".")[0] for name in link.sender.state()} == {"-7", "11"}
    nothing = Link(limit_bytes=0)
    nothing.send(X_NH)
    nothing.settle()
    assert nothing.sender.held_bytes == 0 and nothing.send(X_NH)[0] == Link().send(X_NH)[0]


def test_packets_in_another_order_leave_the_same_references() -> None:
    """A receiver may decode what was lost and sent again after what came later, also where memory is short."""
    sizes = [40, 10, 35, 5, 30, 20]
    packets = [(((key, rows),), seeded(rows, WIDTH, seed=key)) for key, rows in enumerate(sizes)]
    limit = 3 * (RANK + 2) * sum(sizes[:4])
    kept = []
    for order in ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (4, 2, 0, 5, 1, 3)):
        link = Link(limit_bytes=limit)
        for number in order:
            link.send(packets[number][1], packets[number][0])
            assert link.sender.held_bytes <= limit
        link.settle()
        kept.append({name.split(".")[0] for name in link.sender.state()})
    assert kept[0] == kept[1] == kept[2] == {"0", "1", "2", "3"}


def test_a_sample_too_large_for_all_memory_stands_in_nobodys_way() -> None:
    link = Link(limit_bytes=3 * 30 * (RANK + 2))
    link.send(X_NH[:110], ((1, 80), (2, 30)))
    link.settle()
    assert {name.split(".")[0] for name in link.sender.state()} == {"2"}


def test_changes_travel_only_while_their_packet_can_be_held_for_a_resend(link: Link) -> None:
    """Otherwise the rows travel whole, with the values that the changes would have given."""
    x_NH = X_NH + 0.3 * seeded(ROWS, WIDTH, seed=2)
    changes, expected_NH = link.send(x_NH)
    link.settle(keep=False)
    link.sender.limit_bytes = 3 * len(changes) - 3
    packet = link.codec.encode(x_NH, FORWARD, BASIS, rows=link.sender.rows(KEYS))
    assert packet != changes and link.sender.rows(KEYS).held() is None
    fresh = ReuseStore(1 << 20)
    assert torch.equal(link.far.decode(packet, ROWS, FORWARD, BASIS, rows=fresh.rows(KEYS)), expected_NH)


def test_rows_sent_whole_after_their_changes_leave_no_stale_packet(link: Link) -> None:
    link.send(X_NH + 0.01)
    assert link.sender.rows(KEYS).held() is not None
    link.send(X_NH * 2e4)  # outgrows its references, so it travels whole
    assert link.sender.rows(KEYS).held() is None


def test_rows_that_were_zero_at_first_are_not_cut_off_when_they_grow() -> None:
    link = Link()
    link.send(torch.zeros(ROWS, WIDTH))
    link.settle()
    _, arrived_NH = link.send(X_NH)
    assert torch.equal(arrived_NH, LinkCodec(SPEC).project(X_NH, FORWARD, BASIS))


def test_staging_a_sample_again_replaces_it(link: Link) -> None:
    packet, _ = link.send(X_NH + 0.1)
    held = link.sender.held_bytes
    assert link.send(X_NH + 0.1)[0] == packet and link.sender.held_bytes == held


def test_references_survive_a_checkpoint(link: Link) -> None:
    resumed = Link()
    resumed.sender.load(link.sender.state())
    resumed.receiver.load(link.receiver.state())
    assert resumed.sender.held_bytes == link.sender.held_bytes
    assert resumed.send(X_NH + 0.1)[0] == link.send(X_NH + 0.1)[0]


def test_nothing_is_staged_for_rows_that_were_not_sent(link: Link) -> None:
    held = link.sender.held_bytes
    x_NH = X_NH.clone()
    x_NH[70, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="first: row 70"):
        link.codec.encode(x_NH, FORWARD, BASIS, rows=link.sender.rows(KEYS))
    packet = bytearray(link.codec.encode(X_NH, FORWARD, BASIS, rows=link.sender.rows(KEYS)))
    packet[-1] ^= 1
    with pytest.raises(PacketError, match="crc32"):
        link.far.decode(packet, ROWS, FORWARD, BASIS, rows=link.receiver.rows(KEYS))
    assert link.receiver.held_bytes == held


def test_rows_that_outgrow_their_scale_travel_whole(link: Link) -> None:
    _, arrived_NH = link.send(X_NH * 2e4)
    assert torch.equal(arrived_NH, LinkCodec(SPEC).project(X_NH * 2e4, FORWARD, BASIS))


def test_calls_that_make_no_sense_are_refused(link: Link) -> None:
    with pytest.raises(SpecError, match="samples of 120 rows"):
        link.codec.encode(X_NH[:5], FORWARD, BASIS, rows=link.sender.rows(KEYS))
    with pytest.raises(SpecError, match="without reuse"):
        link.codec.encode(X_NH, BACKWARD, BASIS, rows=link.sender.rows(KEYS))
    with pytest.raises(SpecError, match="each key once"):
        link.sender.rows([(1, 5), (1, 6)])
    with pytest.raises(SpecError, match="limit_bytes"):
        ReuseStore(-1)
