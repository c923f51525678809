"""Admission control by queueing time: a call that cannot be answered in time is refused at once, with a retry time.

Calls are answered nearly one after another. `Admission` measures the service time of a call while others wait behind
it, and knows how many wait. Their product is the time that a further call would wait. This is the estimate of Little's
law [1]_, so it also holds where several calls are under way at once, as at a coordinator.

Each caller that is refused gets a retry slot: the slots are spaced as calls are answered, so that a thousand callers
do not come back together. Answers stay quick because the queue stays short, and the rate of answers does not fall
because refusals stay rare. No list of slots is kept: whoever returns early is treated like anybody else, so callers
that ignore the retry time get more answers than those that respect it.

References
----------
.. [1] J. D. C. Little, A Proof for the Queuing Formula L = λW. Operations Research 9(3), 1961.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

#: Most calls that may be under way or wait at once, however quick they are.
MAX_WAITING = 256
#: Weight of the newest measurement in the moving average of the service time.
NEWEST = 1 / 16
#: Retry slots are this many service times apart, since callers that are answered come back as well.
SPACING = 4.0
#: For this many service times after an answer, further calls may be waiting in buffers.
IDLE_SERVICE_TIMES = 3.0
#: Half-life of what is usual on a connection, in seconds, and most connections that are remembered.
HALF_LIFE_S, MAX_PEERS = 30.0, 1024
#: Factor by which the estimated service time grows when there were too many calls.
SLOWER = 1.25
#: Cap on one measurement, as a multiple of the current estimate, since the stated waiting time is only the caller's
#: claim.
MAX_MEASURED_RATIO = 4.0
#: Longest retry time in seconds, and the golden section, which spreads callers over its second half: the fractions of
#: successive multiples are nearly equally spaced.
MAX_RETRY_S, GOLDEN = 10.0, 0.618034
#: Trailing metadata of a refusal: milliseconds after which it makes sense to call again.
RETRY_AFTER = "retry-after-ms"


class OverloadedError(Exception):
    """A call that could not be answered in time."""

    def __init__(self, seconds: float):
        self.retry_after_ms = max(round(1000 * seconds), 1)
        super().__init__(f"busy; call again in {self.retry_after_ms} ms")


class Admission:
    """Decides which calls may wait for an answer, and which are refused.

    Parameters
    ----------
    service_seconds
        First estimate of the service time of a call.
    timeout
        Seconds within which a call is answered that has no deadline, or a later one.
    share
        Share of the time left to a call that it may be expected to spend here. The rest is for the way back, and for
        calls that take longer than expected.
    stale
        Share of its time after which a call that was not looked at so far is no longer worth an answer.
    """

    def __init__(
        self,
        service_seconds: float,
        timeout: float,
        share: float,
        stale: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.service_seconds, self.timeout, self.clock = service_seconds, timeout, clock
        self.share, self.stale = share, stale
        self.refused = 0
        self._places: dict[Place, float] = {}  # of calls that wait, and since when: inf until the message has come
        self._finished = float("-inf")  # when the last answer was given
        self._retry_slot = 0.0
        self._slowed = float("-inf")
        self._usual: dict[str, tuple[float, float]] = {}  # by connection: the most time left to a recent call, and when

    @property
    def waiting(self) -> int:
        """How many calls are under way or wait."""
        return len(self._places)

    def expected_seconds(self) -> float:
        """Seconds that a call which came now would take."""
        if not self._places:
            return self.service_seconds
        # The call at the head has been there since the last answer, or since it came if that was later.
        head_since = max(self._finished, min(self._places.values()))
        head = max(self.clock() - head_since, self.service_seconds)
        return self.waiting * self.service_seconds + head

    def check(self, seconds: float | None, peer: str = "", stated: float | None = None) -> float:
        """Refuse a call with `seconds` left, as an `OverloadedError`, unless it will be answered in time.

        A call that waited in a socket or gRPC buffer is recognised by the gap between the deadline it states and the
        time it has left. Where it states none, the time that calls of its connection usually have left takes the place
        of the deadline, so callers of unlike deadlines should not share a connection. Answering the oldest calls first
        would make all answers late. With an empty queue and no recent answer, every call is admitted; otherwise one
        slow answer would block all later calls.

        Returns
        -------
        float
            Seconds that the call has probably waited.
        """
        if seconds is None:
            age = 0.0
        elif stated is None:
            age = self._age(seconds, peer)
        else:
            age = max(stated - seconds, 0.0)
        if not self.waiting and self.clock() - self._finished > IDLE_SERVICE_TIMES * self.service_seconds:
            return 0.0
        remaining = self.timeout if seconds is None else min(seconds, self.timeout)
        is_stale = age > self.stale * (remaining + age)
        if self.waiting >= MAX_WAITING or self.expected_seconds() > self.share * remaining or is_stale:
            self.refused += 1
            raise OverloadedError(self._next_retry_slot())
        return age

    def _age(self, seconds: float, peer: str) -> float:
        """Seconds that a call has probably waited, judged by the time it has left."""
        now = self.clock()
        usual, then = self._usual.get(peer, (0.0, now))
        usual = max(usual * 0.5 ** ((now - then) / HALF_LIFE_S), seconds)
        if len(self._usual) >= MAX_PEERS:
            self._usual.clear()
        self._usual[peer] = usual, now
        return usual - seconds

    def _next_retry_slot(self) -> float:
        """Seconds until a caller that is refused now should return: after all that were refused before."""
        now, spacing = self.clock(), SPACING * self.service_seconds
        drained = now + max(self.expected_seconds() - self.share * self.timeout, 0)
        self._retry_slot = max(self._retry_slot, drained) + spacing
        if self._retry_slot <= now + MAX_RETRY_S:
            return self._retry_slot - now
        self._retry_slot = now + MAX_RETRY_S  # all slots until then are taken: the callers share them
        return MAX_RETRY_S * (1 - self.refused * GOLDEN % 1 / 2)

    @contextlib.contextmanager
    def admitted(self, seconds: float | None, peer: str = "", stated: float | None = None) -> Iterator[Place]:
        """Let a call wait while the block runs; see `check`."""
        arrived = self.clock() - self.check(seconds, peer, stated)
        place = Place(self, seconds, peer, stated)
        try:
            yield place
            self._measure(arrived)
        finally:
            place.leave()

    def _measure(self, arrived: float) -> None:
        """Update the service time by the seconds since the last answer, or since the call came if that was later.

        If the call arrived after the last answer, its time may exceed the service time of a full queue, so it can only
        lower the estimate.
        """
        now = self.clock()
        taken = min(now - max(arrived, self._finished), MAX_MEASURED_RATIO * self.service_seconds)
        if arrived <= self._finished or taken < self.service_seconds:
            self.service_seconds += NEWEST * (taken - self.service_seconds)
        self._finished = now

    def slow_down(self) -> None:
        """Raise the estimated service time for now: a node behind this process was asked too often.

        It is never raised so far that the second of two simultaneous calls would be refused: one node that is always
        busy must not block callers that get their answers from others.
        """
        now, longest = self.clock(), self.share * self.timeout / 2
        if now - self._slowed >= self.timeout:  # the last change has had time to take effect
            self.service_seconds = max(self.service_seconds, min(SLOWER * self.service_seconds, longest))
            self._slowed = now


class Place:
    """A call's place in the queue, which it leaves while its message is late."""

    def __init__(self, admission: Admission, seconds: float | None, peer: str, stated: float | None):
        self.admission, self.peer, self.stated = admission, peer, stated
        self.deadline = None if seconds is None else admission.clock() + seconds
        self.admission._places[self] = math.inf

    def leave(self) -> None:
        self.admission._places.pop(self, None)

    def keep(self) -> None:
        """Keep the place, as the message has come; an `OverloadedError` if it was left and others have taken it."""
        if self not in self.admission._places:
            remaining = None if self.deadline is None else max(self.deadline - self.admission.clock(), 0.0)
            self.admission.check(remaining, self.peer, self.stated)
        self.admission._places[self] = self.admission.clock()
