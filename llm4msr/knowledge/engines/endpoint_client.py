"""Asks an OpenAI-compatible endpoint, many requests at once, and keeps asking while that may help.

The `openai` client speaks the protocol; its own retries are off. Here every attempt counts against the rate limit, a
throttled request makes the others wait too, and the waits add up to more than a minute, over which most quotas are
counted; the client's end after about 24 seconds and each request waits for itself. Waiting and stopping are
`tenacity`'s, the rate is `aiolimiter`'s. That and `openai` come with the extra ``openai`` and are imported when a
client is made. What is asked and what the answers mean is left to `llm4msr.knowledge.engines.endpoint`.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import tenacity

from llm4msr.config import OpenAIConfig
from llm4msr.knowledge.engines.model_files import EncoderError

BASE_URL_VARIABLE = "OPENAI_BASE_URL"
# Servers without access control need no key, but the client wants one.
NO_KEY = "EMPTY"
# An endpoint that asks for a longer pause than this is not waited for.
MAX_PAUSE_S = 120.0
MAX_MESSAGE_CHARACTERS = 300

_TRANSIENT = frozenset({408, 409, 425, 429})  # and every 5xx
_NO_ACCESS = frozenset({401})
# Of the key or the model until a like request had an answer; then of the one request, such as by content moderation.
_NO_ACCESS_AT_FIRST = frozenset({403, 404})
_OF_CONTENT = frozenset({400, 403, 413, 422})


class RequestError(Exception):
    """A request without a usable answer; others may still have one.

    Attributes:
        of_content: What was asked is at fault, so that less of it may succeed; not the endpoint's state.
    """

    def __init__(self, message: str, of_content: bool = False) -> None:
        super().__init__(message)
        self.of_content = of_content


def endpoint_address(config: OpenAIConfig) -> str | None:
    """Returns the address from the configuration or the environment; None where neither has one.

    Args:
        config: Of the endpoint.

    Raises:
        EncoderError: The address has credentials or a query, which a configuration refuses to hold. Addresses are
            logged and kept in manifests, secrets are not; the message shows neither.
    """
    address = config.base_url or os.environ.get(BASE_URL_VARIABLE)
    if not address:
        return None
    # Not by parsing: a secret may hold characters that make the address another one, or none.
    if found := [character for character in "@?#" if character in address]:
        raise EncoderError(
            f"the environment variable {BASE_URL_VARIABLE} holds {' and '.join(map(repr, found))}, as of credentials "
            "or a query: give an address such as http://host:8000/v1, and the key in the environment variable named "
            f"by knowledge.openai.api_key_env, now {config.api_key_env}"
        )
    return address


class EndpointClient:
    """A connection pool to one endpoint; all its requests must be made in one event loop.

    Args:
        config: Address, limits and retries. The key is read from the environment variable `api_key_env`; where that
            is unset, "EMPTY" is sent, which local servers accept.
        num_actors: Clients that share `requests_per_minute` in equal parts.

    Attributes:
        base_url: Address with its version.
        reached: Whether the endpoint has answered anything yet.

    Raises:
        EncoderError: A library is missing, or no address is given, or one as `endpoint_address` refuses it.
    """

    def __init__(self, config: OpenAIConfig, num_actors: int = 1) -> None:
        try:
            import aiolimiter
            import httpx2
            import openai
        except ImportError as error:
            raise EncoderError(
                f"knowledge.engine 'openai' needs the package {error.name}: pip install llm4msr[openai]"
            ) from error
        base_url = endpoint_address(config)
        if base_url is None:
            raise EncoderError(
                "knowledge.engine 'openai' has no address: set knowledge.openai.base_url, such as "
                f"http://host:8000/v1, or the environment variable {BASE_URL_VARIABLE}"
            )
        self.base_url = base_url
        self.reached = False
        self._answered: set[str] = set()  # paths
        self._config = config
        self._openai = openai
        self._key = os.environ.get(config.api_key_env) or NO_KEY
        # By default the client keeps 100 connections open, however many are in use.
        limits = httpx2.Limits(max_connections=config.max_in_flight, max_keepalive_connections=config.max_in_flight)
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=base_url,
            max_retries=0,
            timeout=config.timeout_s,
            http_client=openai.DefaultAsyncHttpxClient(limits=limits),
        )
        self._slots = asyncio.Semaphore(config.max_in_flight)
        self._limiter = None
        if config.requests_per_minute is not None:
            per_s = config.requests_per_minute / num_actors / 60
            # Bursts of a tenth of a second: enough for a timer that is late, too little to break a limit.
            burst = max(1.0, per_s / 10)
            self._limiter = aiolimiter.AsyncLimiter(burst, burst / per_s)
        self._resume_at = 0.0
        self._attempts = config.max_retries + 1
        self._backoff = tenacity.wait_exponential_jitter(max=60, jitter=1)
        self._retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=self._wait,
            retry=tenacity.retry_if_exception(self._is_transient),
            reraise=True,
        )

    async def embed(self, **body: Any) -> Any:
        """Returns the JSON that ``POST /embeddings`` answers to `body`.

        Raises:
            EncoderError: The endpoint cannot be reached, or refuses access or the model: no request will succeed.
            RequestError: This request has no usable answer; a 403 or 404 too, once ``POST /embeddings`` had one.
        """
        return await self._ask("embeddings", self._client.embeddings.with_raw_response.create, body)

    async def chat(self, **body: Any) -> Any:
        """Returns the JSON that ``POST /chat/completions`` answers to `body`.

        Raises:
            EncoderError: As for `embed`.
            RequestError: As for `embed`, with its own path.
        """
        return await self._ask("chat/completions", self._client.chat.completions.with_raw_response.create, body)

    async def _ask(self, path: str, send: Callable[..., Awaitable[Any]], body: dict[str, Any]) -> Any:
        what = f"POST {self.base_url.rstrip('/')}/{path} for model {body['model']!r}"
        try:
            response: Any = await self._retrying.copy()(self._attempt, send, body)
        except self._openai.APIStatusError as error:
            raise self._refusal(what, error, path in self._answered) from None
        except (self._openai.APIConnectionError, TimeoutError) as error:
            if isinstance(error, self._openai.APITimeoutError | TimeoutError):
                reason = f"none within {self._config.timeout_s} s"
            else:
                reason = self._brief(f"{type(error.__cause__).__name__} {error.__cause__}")
            said = f"no answer after {self._attempts} attempts: {reason}"
            if self.reached:
                raise RequestError(said) from None
            raise EncoderError(
                f"{what}: {said}. Check that the endpoint runs, and knowledge.openai.base_url and timeout_s"
            ) from None
        try:
            # Not the client's parsed object: building one goes through every number of every vector in Python.
            answer = response.http_response.json()
        except ValueError as error:
            raise RequestError(f"the answer is no JSON: {self._brief(str(error))}", of_content=True) from None
        self._answered.add(path)
        return answer

    def _refusal(self, what: str, error: Any, answered: bool) -> EncoderError | RequestError:
        """Returns what a status of 400 or more means, after the last attempt."""
        status = error.status_code
        told = error.body.get("message") if isinstance(error.body, dict) else None
        said = self._brief(str(told or error.message))
        if status in _NO_ACCESS or (status in _NO_ACCESS_AT_FIRST and not answered):
            return EncoderError(
                f"{what} answered {status}: {said}. Check knowledge.openai.base_url (with its version, such as /v1), "
                f"knowledge.model, and the key in the environment variable {self._config.api_key_env}, "
                f"which is {'unset' if self._key == NO_KEY else 'set'}"
            )
        pause = _retry_after_s(error.response.headers)
        if pause is not None and pause > MAX_PAUSE_S:
            return RequestError(f"{status}, and to be asked again in {pause:.0f} s only, which is too late: {said}")
        if _is_transient(status):
            return RequestError(f"{status} after {self._attempts} attempts: {said}")
        return RequestError(f"{status}: {said}", status in _OF_CONTENT)

    async def _attempt(self, send: Callable[..., Awaitable[Any]], body: dict[str, Any]) -> Any:
        async with self._slots:
            await self._turn()
            try:
                async with asyncio.timeout(self._config.timeout_s):
                    response = await send(**body)
            except self._openai.APIStatusError as error:
                self.reached = True
                pause = _retry_after_s(error.response.headers)
                if pause is not None and self._is_transient(error):
                    self._resume_at = max(self._resume_at, time.monotonic() + pause)
                raise
            self.reached = True
            return response

    async def _turn(self) -> None:
        """Waits until the rate limit, and the last pause that the endpoint asked for, let one more request start."""
        while True:
            if self._limiter is not None:
                await self._limiter.acquire()
            if (pause := self._resume_at - time.monotonic()) <= 0:
                return
            await asyncio.sleep(pause * random.uniform(1, 1.1))

    def _is_transient(self, error: BaseException) -> bool:
        if isinstance(error, self._openai.APIStatusError):
            return _is_transient(error.status_code) and (_retry_after_s(error.response.headers) or 0) <= MAX_PAUSE_S
        return isinstance(error, self._openai.APIConnectionError | TimeoutError)

    def _wait(self, state: Any) -> float:
        """Returns the seconds until the next attempt; a pause that the endpoint asked for is waited for by `_turn`."""
        error = state.outcome.exception()
        asked = isinstance(error, self._openai.APIStatusError) and _retry_after_s(error.response.headers) is not None
        return 0.0 if asked else self._backoff(state)

    def _brief(self, message: str) -> str:
        """Returns a message that shows no key, in one short line."""
        if self._key != NO_KEY:
            message = message.replace(self._key, "***")
        message = " ".join(message.split())
        return message if len(message) <= MAX_MESSAGE_CHARACTERS else f"{message[:MAX_MESSAGE_CHARACTERS]}..."


def _is_transient(status: int) -> bool:
    return status in _TRANSIENT or status >= 500


def _retry_after_s(headers: Any) -> float | None:
    """Returns the seconds that the headers ask to wait, given in seconds, in milliseconds or as a date."""
    for name, per_s in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) / per_s
        except (KeyError, ValueError):
            continue
        return None if math.isnan(seconds) else max(seconds, 0.0)
    try:
        return max(email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time(), 0.0)
    except (KeyError, ValueError):
        return None
