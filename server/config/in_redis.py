"""A live configuration in Redis, for many servers: a change through any of them reaches all."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from pathlib import Path

import redis
from redis.asyncio import Redis

from server.config.local import refuse_stale
from server.config.shared import Check, SharedConfig
from server.config.stored import read_configuration
from server.dial import RSetting
from server.errors import InvalidError, ServerError, SettingsError, UnavailableError
from server.types import Configuration
from server.unnamed import UnnamedFile

KEY = "tome:configuration"
"""Of the document, and of the channel that says that it has changed."""
POLL_S = 2.0
"""A message may be lost; the document is read this often in any case."""
RETRY_S = 0.5
TIMEOUT_S = 2.0
_URL = re.compile(r"(rediss?://[^/?#]*(/[0-9]*)?|unix://[^/?#]*/[^?#@]*)(\?[^#@]*)?")


class RedisConfig(SharedConfig):
    """Follows one document in Redis and changes it, by comparison with its version, so that no change is lost.

    While Redis is away the last good configuration goes on and changes are refused. A Redis that comes back without its
    data gets the newest document from whoever holds it: versions never go back.

    Args:
        url: `redis://[:PASSWORD@]HOST[:PORT][/DATABASE]`, or `rediss://` for TLS; deployments that share a Redis take a
            database each.

    Raises:
        SettingsError: The URL is none of Redis.
    """

    def __init__(
        self,
        start: Mapping[str, RSetting],
        url: str,
        cache: Path | None,
        check: Check,
        memory: UnnamedFile | None = None,
    ) -> None:
        try:
            # Without timeouts of its own, which lose a cancellation that comes at the wrong moment (asyncio.wait_for).
            self._redis: Redis = Redis.from_url(url, socket_timeout=None, socket_connect_timeout=None)
            if not _URL.fullmatch(url):
                raise ValueError("it has another scheme, or a part of the password would be taken for the host")
        except ValueError:  # whose text may hold a part of the password, as the URL does
            raise SettingsError(
                "shared configuration: it is no URL of Redis, like redis://[:PASSWORD@]HOST[:PORT][/DATABASE]; in a "
                "password write / ? # @ : as %2F %3F %23 %40 %3A"
            ) from None
        where = self._redis.connection_pool.connection_kwargs  # the URL may hold a password
        source = f"Redis at {where.get('host', 'localhost')}:{where.get('port', 6379)}"
        super().__init__(
            start, source, cache, lambda models: check({n: r for n, r in models.items() if n in self._start}), memory
        )
        with redis.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S) as client:
            try:
                self._take_over(client.get(KEY))
            except (redis.RedisError, OSError, ValueError) as error:  # ValueError: of a URL with decode_responses
                self._say_reached(str(error))

    async def change(self, changes: Mapping[str, RSetting], expected_version: int | None = None) -> Configuration:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                document = await self._write(changes, expected_version)
        except (redis.RedisError, OSError, TimeoutError) as error:
            raise UnavailableError(
                f"{self._source} keeps the configuration and does not answer ({str(error) or 'timeout'})",
                retry_after_s=1,
            ) from error
        if document.version > self._shared.version:  # else its message was faster
            self._adopt(document)
        return self.configuration

    async def follow(self) -> None:
        async with self._redis:
            while True:
                try:
                    async with self._redis.pubsub() as messages:
                        async with asyncio.timeout(TIMEOUT_S):
                            await messages.subscribe(KEY)
                        while True:
                            async with asyncio.timeout(TIMEOUT_S):
                                await self._catch_up()
                            self._say_reached()
                            await messages.get_message(ignore_subscribe_messages=True, timeout=POLL_S)
                except (redis.RedisError, OSError, TimeoutError) as error:
                    self._say_reached(str(error) or "no answer")
                    await asyncio.sleep(RETRY_S)
                except Exception as error:  # the next document may be a good one
                    self._say_refused(error)
                    await asyncio.sleep(RETRY_S)

    async def _catch_up(self) -> None:
        """Reads the document; one that is older than what it said once, or gone, is written again."""
        version = self._take_over(await self._redis.get(KEY))
        if version is not None and version < self._shared.version and self._shared.models:
            await self._write({}, None)

    def _take_over(self, raw: bytes | str | None) -> int | None:
        """Adopts a document that is newer; gives its version, 0 for none at all, None for one that is refused."""
        try:
            document = _document(raw)
            if document.version > self._shared.version:
                self._adopt(document)
            else:
                self._say_taken()
        except ServerError as error:
            self._say_refused(error)
            return None
        return document.version

    async def _write(self, changes: Mapping[str, RSetting], expected_version: int | None) -> Configuration:
        """Puts changes upon the newest document that is known, here or there.

        Raises:
            UnavailableError: What is there is no configuration, or holds an `r` that a model of this server cannot
                merge and the changes leave.
        """
        self._check(changes)
        async with self._redis.pipeline() as transaction:
            while True:
                await transaction.watch(KEY)
                raw = await transaction.get(KEY)
                try:
                    newest = max(_document(raw), self._shared, key=lambda each: each.version)
                    document = Configuration(newest.version + bool(changes), {**newest.models, **changes})
                    self._check(document.models)
                except ServerError as error:  # which is no fault of the changes
                    raise UnavailableError(f"what {self._source} says is refused: {error.message}") from error
                refuse_stale(expected_version, newest.version)
                transaction.multi()  # type: ignore[no-untyped-call]
                transaction.set(KEY, json.dumps(document.to_json()))
                transaction.publish(KEY, document.version)
                try:
                    await transaction.execute()
                except redis.WatchError:
                    continue  # another server was faster; upon what it wrote
                return document


def _document(raw: bytes | str | None) -> Configuration:
    """Raises InvalidError for what no server has written."""
    if raw is None:
        return Configuration(0, {})
    try:
        return read_configuration(raw)
    except InvalidError as error:
        raise InvalidError(f"{KEY} holds no configuration ({error}); remove it") from error
