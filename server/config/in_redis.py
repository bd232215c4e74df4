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
"""Key of the document, and name of the channel that announces its changes."""
POLL_S = 2.0
"""Seconds between reads of the document, in case a message is lost."""
RETRY_S = 0.5
TIMEOUT_S = 2.0
_URL = re.compile(r"(rediss?://[^/?#]*(/[0-9]*)?|unix://[^/?#]*/[^?#@]*)(\?[^#@]*)?")


class RedisConfig(SharedConfig):
    """Follows one document in Redis. A change compares versions, so that no change is lost.

    While Redis does not answer, the last good configuration stays in force and changes are refused. A Redis that comes
    back without its data gets the newest document of any server: versions never decrease.

    Args:
        url: `redis://[:PASSWORD@]HOST[:PORT][/DATABASE]`, or `rediss://` for TLS. Deployments that share a Redis use a
            database each.

    Raises:
        SettingsError: The URL is not one of Redis.
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
            # Redis' own timeouts use asyncio.wait_for, which may lose a cancellation.
            self._redis: Redis = Redis.from_url(url, socket_timeout=None, socket_connect_timeout=None)
            if not _URL.fullmatch(url):
                raise ValueError("it has another scheme, or a part of the password would be taken for the host")
        except ValueError:  # its text may hold a part of the password, as the URL does
            raise SettingsError(
                "shared configuration: the URL must have the form redis://[:PASSWORD@]HOST[:PORT][/DATABASE]; in the "
                "password write / ? # @ : as %2F %3F %23 %40 %3A"
            ) from None
        where = self._redis.connection_pool.connection_kwargs  # never the URL, which may hold a password
        source = f"Redis at {where.get('host', 'localhost')}:{where.get('port', 6379)}"
        super().__init__(
            start, source, cache, lambda models: check({n: r for n, r in models.items() if n in self._start}), memory
        )
        with redis.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S) as client:
            try:
                self._take_over(client.get(KEY))
            except (redis.RedisError, OSError, ValueError) as error:  # ValueError: a URL with decode_responses
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
        if document.version > self._shared.version:  # otherwise its message was faster
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
                except Exception as error:  # the next document may be good
                    self._say_refused(error)
                    await asyncio.sleep(RETRY_S)

    async def _catch_up(self) -> None:
        """Reads the document. A document that is older than before, or missing, is written again."""
        version = self._take_over(await self._redis.get(KEY))
        if version is not None and version < self._shared.version and self._shared.models:
            await self._write({}, None)

    def _take_over(self, raw: bytes | str | None) -> int | None:
        """Adopts a newer document. Returns its version, 0 if there is none, or None if it is refused."""
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
        """Applies changes to the newest known document, of Redis or of this server.

        Raises:
            UnavailableError: The stored document is no configuration, or keeps an `r` that a model of this server
                cannot merge.
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
                except ServerError as error:  # not the fault of the changes
                    raise UnavailableError(
                        f"the configuration of {self._source} is refused: {error.message}"
                    ) from error
                refuse_stale(expected_version, newest.version)
                transaction.multi()  # type: ignore[no-untyped-call]
                transaction.set(KEY, json.dumps(document.to_json()))
                transaction.publish(KEY, document.version)
                try:
                    await transaction.execute()
                except redis.WatchError:
                    continue  # another server was faster; try again on its document
                return document


def _document(raw: bytes | str | None) -> Configuration:
    """Raises InvalidError for a document that no server has written."""
    if raw is None:
        return Configuration(0, {})
    try:
        return read_configuration(raw)
    except InvalidError as error:
        raise InvalidError(f"{KEY} holds no configuration ({error}); remove it") from error
