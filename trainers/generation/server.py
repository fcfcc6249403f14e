"""A server that is asked for JSON over HTTP: attempts that fail are repeated, and what fails for good says why."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

KEY_VARIABLE = "OPENAI_API_KEY"  # of the environment
ATTEMPTS, PAUSE = 7, 0.5  # of one request: 0, 1, 2, 4, 8 and 16 seconds lie between them
TELLING = 5.0  # seconds between two warnings
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that may pass: too many requests, overload, a restart

logger = logging.getLogger(__name__)


class ServerError(OSError):
    """A server cannot be reached, refuses a request (then with its `status`) or gives half an answer."""

    status: int | None = None


class Told(Retry):
    """Says that it asks again, once in a while: urllib3 itself is silent."""

    last = 0.0

    def increment(self, method=None, url=None, response=None, error=None, *more, **keywords):
        again = super().increment(method, url, response, error, *more, **keywords)
        if time.monotonic() - Told.last > TELLING:
            Told.last = time.monotonic()
            logger.warning("%s is asked again: %s", url, error if response is None else f"status {response.status}")
        return again


class Server:
    """A server and a session of connections to it, which threads may share.

    Args:
        url: such as "http://localhost:8000"; "/v1" at its end is left out.
        timeout: seconds to wait for an answer; an attempt that waits longer is repeated.
        attempts: of one request.
        key: name of the environment variable with the key, sent as a bearer token where it is set.
    """

    def __init__(self, url: str, *, timeout: float = 600.0, attempts: int = ATTEMPTS, key: str = KEY_VARIABLE):
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self.repeated = 0  # attempts that failed and were made again
        retry = Told(attempts - 1, backoff_factor=PAUSE, status_forcelist=PASSING, allowed_methods=None,
                     raise_on_status=False)  # fmt: skip
        self._session = requests.Session()
        self._session.mount(self.url, HTTPAdapter(pool_maxsize=256, max_retries=retry))
        self._key = "".join(os.environ.get(key, "").split())  # requests would show one with a line end in its error
        if self._key:
            self._session.headers["Authorization"] = f"Bearer {self._key}"

    def ask(self, path: str, content: dict | None = None) -> dict:
        """The JSON object that the server answers to `content`, sent by POST, or to a GET without it.

        Raises:
            ServerError: as of `send`, or the answer is no JSON object.
        """
        text = self.send(path, content)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ServerError(f"{self.url}{path} did not answer with a JSON object: {self._shown(text):.300}")
        return answer

    def send(self, path: str, content: dict | None = None) -> str:
        """The text of an answer.

        Raises:
            ServerError: the server cannot be reached or refuses, in all attempts.
        """
        url = self.url + path
        try:
            if content is None:
                answer = self._session.get(url, timeout=self.timeout)
            else:
                answer = self._session.post(url, json=content, timeout=self.timeout)
        except requests.RequestException as error:
            raise ServerError(f"{url} cannot be reached: {error}") from error
        self.repeated += len(answer.raw.retries.history)  # type: ignore[union-attr]
        if not answer.ok:
            refusal = ServerError(f"{url} refused a request ({answer.status_code}): {self._shown(answer.text):.1000}")
            refusal.status = answer.status_code
            raise refusal
        return answer.text

    def _shown(self, text: str) -> str:
        """What a server says may repeat the key, which belongs in no log."""
        return text.replace(self._key, "***") if self._key else text


def in_flight(function: Callable[[Any], Any], items: list, at_once: int) -> Iterator[dict[int, Any]]:
    """Results by position, as they are done, with `at_once` calls under way in threads.

    After a call that fails no further one starts; its error comes when those under way have given their results.
    """
    errors: list[BaseException] = []

    def call(pair: tuple[int, Any]) -> dict[int, Any]:
        at, item = pair
        try:
            return {} if errors else {at: function(item)}
        except BaseException as error:  # one that ended its thread would be waited for without an end
            errors.append(error)
            return {}

    # Its threads, unlike those of an executor, end with a program that is interrupted.
    with ThreadPool(max(1, min(at_once, len(items)))) as pool:
        yield from filter(None, pool.imap_unordered(call, enumerate(items)))
    if errors:
        raise errors[0]
