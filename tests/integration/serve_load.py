"""Clients that ask a deployment all the time, and note what they get."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass

import httpx

TOKEN = "a-valid-token-0123456"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
BODY = {"user": 1000, "scenario": "rec", "items": [7000, 7001, 7002, 7003]}
NUM_CLIENTS = 4


@dataclass(frozen=True)
class Answer:
    """What one request got.

    Attributes:
        status: HTTP status, or the name of the client's error.
        version: Model version of an answer.
        scores: Items and scores of an answer.
        at: When it came, of time.monotonic.
        seconds: How long it took.
        retry_after: The header.
    """

    status: int | str
    version: str | None
    scores: tuple
    at: float
    seconds: float
    retry_after: str | None = None


class Load:
    """Clients that ask all the time, but when told to come again later, until the end of the block; what they got."""

    def __init__(self, url: str, num_clients: int = NUM_CLIENTS, body: dict | None = None) -> None:
        self.url, self.body = url, BODY if body is None else body
        self.answers: list[Answer] = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.ask) for _ in range(num_clients)]

    def ask(self) -> None:
        with httpx.Client(headers=AUTHORIZED, timeout=30) as client:
            while not self.stop.is_set():
                started = time.monotonic()
                try:
                    answer = client.post(f"{self.url}/v1/rank", json=self.body)
                    found = answer.json() if answer.status_code == 200 else {}
                    got = answer.status_code, found.get("model_version"), scores(found)
                    retry_after = answer.headers.get("retry-after")
                except httpx.HTTPError as error:
                    got, retry_after = (type(error).__name__, None, ()), None
                ended = time.monotonic()
                self.answers.append(Answer(*got, ended, ended - started, retry_after))
                if retry_after is not None:
                    self.stop.wait(float(retry_after))

    def counts(self, since: float = 0) -> Counter:
        """Returns how often each status came, of the answers after some moment."""
        return Counter(answer.status for answer in list(self.answers) if answer.at >= since)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def scores(answer: dict) -> tuple:
    return tuple((r["item"], round(r["score"], 5)) for r in answer.get("results", ()))
