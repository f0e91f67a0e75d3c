"""What a client keeps of a stream, so that another router can go on with it where it broke."""

from __future__ import annotations

from collections import defaultdict

from segue.client.events import Event, Output, Started
from segue.v1 import inference_pb2 as pb


class Resumption:
    """One request, whose events it sees as they come."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = request
        self._seed = self._created_unix_s = 0
        self._token_ids: defaultdict[int, list[int]] = defaultdict(list)
        self._finished: set[int] = set()

    def see(self, event: Event) -> bool:
        """Whether the caller is to see it too: a stream that goes on does not begin again."""
        if isinstance(event, Started):
            self._seed, self._created_unix_s = event.seed, event.created_unix_s
            return not self._token_ids
        if isinstance(event, Output):
            self._token_ids[event.choice] += [token.token_id for token in event.tokens]
            if event.finish_reason is not None:
                self._finished.add(event.choice)
        return True

    def request(self) -> pb.GenerateRequest:
        """To be sent next: for the rest, once there was output."""
        if not self._token_ids:
            return self._request
        resumed = pb.GenerateRequest()
        resumed.CopyFrom(self._request)
        resumed.resume.seed, resumed.resume.created_unix_s = self._seed, self._created_unix_s
        for choice in range(max(self._token_ids) + 1):
            resumed.resume.choices.add(token_ids=self._token_ids[choice], finished=choice in self._finished)
        return resumed
