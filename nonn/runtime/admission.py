"""Admission of calls by queue time: whoever cannot be answered in time is refused at once, and told when to return.

Calls are answered one after another, or as good as: `Admission` measures what each takes when others wait behind it,
and knows how many wait. Their product is what a further call would wait for. The estimate is that of Little's law
[1]_, so it also holds where several calls are under way at once, as at a coordinator.

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

#: Calls that may be under way or wait at once, however quick they are.
MAX_WAITING = 256
#: Weight of the newest measurement in the moving average of the service time.
NEWEST = 1 / 16
#: Moments of return lie this many service times apart: callers who are answered come back as well.
SPACING = 4.0
#: Service times after an answer in which further calls may well be waiting unseen.
IDLE_SERVICE_TIMES = 3.0
#: Seconds in which half of what was usual on a connection is forgotten, and connections that are known.
HALF_LIFE_S, MAX_PEERS = 30.0, 1024
#: By how much calls are thought to take longer when there were too many.
SLOWER = 1.25
#: By how many times what was thought one measurement counts at most: what a call says that it has waited is its word.
MAX_MEASURED_RATIO = 4.0
#: Seconds after which a refused caller may return at the latest, and what spreads those of the latter half over it: the
#: golden section, of whose multiples any few in a row have nearly equally distant fractions.
MAX_RETRY_S, GOLDEN = 10.0, 0.618034
#: Trailing metadata of a refusal: milliseconds after which it makes sense to call again.
RETRY_AFTER = "retry-after-ms"


class OverloadedError(Exception):
    """A call that could not be answered in time."""

    def __init__(self, seconds: float):
        self.retry_after_ms = max(round(1000 * seconds), 1)
        super().__init__(f"busy; call again in {self.retry_after_ms} ms")


class Admission:
    """Who may wait for an answer, and who is sent away.

    Parameters
    ----------
    service_seconds
        First guess of what a call takes, until it is measured.
    timeout
        Seconds within which a call without a deadline, or with a later one, shall be answered.
    share
        Of the time that a call has left, what it may spend here by expectation; the rest is for its way back, and for
        what is longer than expected.
    stale
        Share of its time after which a call that nobody has looked at so far is not worth an answer any more.
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
        self._places: dict[Place, float] = {}  # of those that wait, and since when: inf until the message has come
        self._finished = float("-inf")  # when the last answer was given
        self._retry_slot = 0.0
        self._slowed = float("-inf")
        self._usual: dict[str, tuple[float, float]] = {}  # by connection: the most time left of late, and when

    @property
    def waiting(self) -> int:
        """How many calls are under way or wait."""
        return len(self._places)

    def expected_seconds(self) -> float:
        """What a call that came now would take."""
        if not self._places:
            return self.service_seconds
        # The call at the head got there by the last answer, or when it came if that was later.
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
        """Seconds that a call has probably waited, by what it has left."""
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
        """Take over what an answer took since the one before, or since its call came.

        Of a call that came later than that, the time may be longer than the pace of a queue, and is only taken over if
        it is shorter than what was thought.
        """
        now = self.clock()
        taken = min(now - max(arrived, self._finished), MAX_MEASURED_RATIO * self.service_seconds)
        if arrived <= self._finished or taken < self.service_seconds:
            self.service_seconds += NEWEST * (taken - self.service_seconds)
        self._finished = now

    def slow_down(self) -> None:
        """Take calls for longer than measured, for now: somebody behind this process has been asked too often.

        They are never taken for so long that of two calls at once the second would be refused: somebody who is always
        busy must not close the door to those who get their answers from others.
        """
        now, longest = self.clock(), self.share * self.timeout / 2
        if now - self._slowed >= self.timeout:  # what was changed before has had time to show
            self.service_seconds = max(self.service_seconds, min(SLOWER * self.service_seconds, longest))
            self._slowed = now


class Place:
    """A call's place in the queue, which it can leave while it is itself waited for."""

    def __init__(self, admission: Admission, seconds: float | None, peer: str, stated: float | None):
        self.admission, self.peer, self.stated = admission, peer, stated
        self.deadline = None if seconds is None else admission.clock() + seconds
        self.admission._places[self] = math.inf

    def leave(self) -> None:
        self.admission._places.pop(self, None)

    def keep(self) -> None:
        """The message has come. An `OverloadedError` if the place was left, and others have taken it."""
        if self not in self.admission._places:
            remaining = None if self.deadline is None else max(self.deadline - self.admission.clock(), 0.0)
            self.admission.check(remaining, self.peer, self.stated)
        self.admission._places[self] = self.admission.clock()
