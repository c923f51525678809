"""The model of a link, by hand and against theory."""

import pytest

from nonn.core.errors import UserError
from nonn.core.links import MTU, PRESETS, Link, datagram_bytes, round_trip, tcp_goodput
from nonn.testbed.relay import Switch, retransmission_timeout

#: One bit a microsecond: a packet of 125 bytes takes 1 ms.
MEGABIT = Link(1e6)
PACKET = bytes(125)


def arrivals(switch: Switch) -> list[tuple[float, int]]:
    """Milliseconds and receivers of all packets under way, when the switch itself says when to look."""
    found = []
    while (now := switch.next_event) < float("inf"):
        found += [(round(1000 * now, 6), receiver) for receiver, _ in switch.arrived(now)]
    return found


# ---- theory, by hand


@pytest.mark.parametrize(
    ("payload", "n_bytes"),
    [(64, 92), (1024, 1052), (1472, 1500), (1473, 1521), (4096, 4164), (12288, 12476)],  # 1, 1, 1, 2, 3 and 9 packets
)
def test_bytes_of_a_message(payload, n_bytes):
    assert datagram_bytes(payload) == n_bytes


def test_round_trips_by_hand():
    assert round_trip(Link(250e3), 64) == pytest.approx(2 * 92 * 8 / 250e3) == pytest.approx(5.888e-3)
    assert round_trip(Link(250e3), 12288) == pytest.approx(0.798464)
    assert round_trip(Link(20e6, 0.002), 1024) == pytest.approx(4.8416e-3)
    assert round_trip(Link(20e6, 0.002, shared=True), 1024) == pytest.approx(4.8416e-3)


def test_tcp_goodput_by_hand():
    assert tcp_goodput(Link(100e6)) == pytest.approx(100e6 * 1448 / 1500)
    assert tcp_goodput(Link(100e6, shared=True)) == pytest.approx(100e6 * 2896 / 3052)


@pytest.mark.parametrize("wrong", [{"rate_bps": 0}, {"delay_s": -1}, {"loss": 1}, {"rate_bps": float("nan")}])
def test_impossible_links_are_refused(wrong):
    with pytest.raises(UserError, match="a link has rate_bps > 0"):
        Link(**{"rate_bps": 1e6} | wrong)


# ---- the model, by hand


def test_one_packet_pays_its_time_once_and_the_delay():
    switch = Switch(Link(1e6, 0.010), 2)
    switch.send(0, 0, 1, PACKET)
    assert switch.arrived(0.0109) == []
    assert arrivals(switch) == [(11, 1)]


def test_packets_of_one_sender_follow_each_other():
    switch = Switch(Link(1e6, 0.010), 3)
    for receiver in (1, 2, 1):
        switch.send(0, 0, receiver, PACKET)
    assert arrivals(switch) == [(11, 1), (12, 2), (13, 1)]


def test_packets_of_several_senders_to_one_receiver_queue():
    switch = Switch(MEGABIT, 4)
    for sender in (0, 1, 2):
        switch.send(0, sender, 3, PACKET)
    assert arrivals(switch) == [(1, 3), (2, 3), (3, 3)]


def test_both_directions_and_other_pairs_do_not_wait_for_each_other():
    switch = Switch(MEGABIT, 4)
    for sender, receiver in ((0, 1), (1, 0), (2, 3), (3, 2)):
        switch.send(0, sender, receiver, PACKET)
    assert sorted(arrivals(switch)) == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_what_still_waits_at_its_sender_does_not_hold_the_line_to_its_receiver():
    switch = Switch(MEGABIT, 4)
    for receiver in (1, 1, 1, 2):
        switch.send(0, 0, receiver, PACKET)
    switch.send(0.001, 3, 2, PACKET)  # host 0 gets to its packet for host 2 at 3 ms
    assert arrivals(switch) == [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)]


def test_on_a_shared_medium_one_packet_is_sent_at_a_time():
    switch = Switch(Link(1e6, 0.010, shared=True), 4)
    for sender, receiver in ((0, 1), (2, 3), (1, 0)):
        switch.send(0, sender, receiver, PACKET)
    assert arrivals(switch) == [(11, 1), (12, 3), (13, 0)]


@pytest.mark.parametrize("shared", [False, True])
def test_full_queues_drop_what_comes_last(shared):
    switch = Switch(Link(1e6, shared=shared), 2)
    for _ in range(10_000):  # 1.25 MB at once; the queue holds 256 KiB
        switch.send(0, 0, 1, PACKET)
    kept = arrivals(switch)
    assert kept == [(n + 1, 1) for n in range(len(kept))]
    assert 256 * 1024 <= len(kept) * 125 <= 256 * 1024 + 250


def test_loss_is_about_its_share_and_the_same_for_the_same_seed():
    def received(seed: int) -> list[tuple[float, int]]:
        switch = Switch(Link(1e9, loss=0.2, seed=seed), 2)
        for number in range(2000):
            switch.send(number / 1000, 0, 1, PACKET)
        return arrivals(switch)

    assert len(received(0)) == pytest.approx(1600, abs=90)  # five standard deviations
    assert received(0) == received(0) != received(1)


@pytest.mark.parametrize("payload", [64, 1473, 12288])  # 1, 2 and 9 packets
@pytest.mark.parametrize("link", PRESETS.values(), ids=PRESETS)
def test_a_message_and_its_echo_take_as_long_as_in_theory(link, payload):
    n_full, last = divmod(datagram_bytes(payload), MTU)
    packets = [bytes(MTU)] * n_full + [bytes(last)]
    now, switch = 0.0, Switch(link, 2)
    for sender, receiver in ((0, 1), (1, 0)):
        for packet in packets:
            switch.send(now, sender, receiver, packet)
        received = []
        while (event := switch.next_event) < float("inf"):
            now = event
            received += switch.arrived(now)
        assert received == [(receiver, packet) for packet in packets]
    assert now == pytest.approx(round_trip(link, payload), rel=1e-9)


@pytest.mark.parametrize(("shared", "each"), [(False, 100), (True, 50)])
def test_two_senders_get_half_of_a_shared_medium(shared, each):
    switch = Switch(Link(1e6, shared=shared), 4)
    for number in range(100):  # both send all the time, for 100 ms
        for sender, receiver in ((0, 1), (2, 3)):
            switch.send(number / 1000, sender, receiver, PACKET)
    receivers = [receiver for time, receiver in arrivals(switch) if time <= 100]
    assert (receivers.count(1), receivers.count(3)) == (each, each)


def test_tcp_is_as_patient_as_64_kib_take():
    assert retransmission_timeout(Link(250e3)) == pytest.approx(2.097152)
    assert retransmission_timeout(Link(100e6)) == 0.2
