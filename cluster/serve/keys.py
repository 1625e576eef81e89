"""API keys: who may ask, how much of it, and the file that says so.

A key is 256 bits from the system's random source. The file holds its SHA-256 and not the key: whoever reads the file
cannot ask with it. One SHA-256 is enough, without salt and without a slow hash such as Argon2, because those make up
for what people think up: of 2^256 equally likely keys none is worth guessing, and no table holds them.

The file is JSON, `{"keys": [{"name", "sha256", limits...}]}`. Imports no Ray, so that it can be read before Ray is
configured.
"""

import asyncio
import fcntl
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.serve.errors import ServeError
from cluster.storage import NotFound, StorageError, Store, has_credentials

logger = logging.getLogger("ray.serve")

KEY_PREFIX = "sk-caravan-"
MAX_KEY_BYTES = 256
REREAD_S = 5.0

_KEY_BYTES = 32
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

Limit = Annotated[int, Field(ge=1)]


class KeysError(ServeError):
    """The key file is not there, cannot be read, or does not say what it should."""


class NoKeyFile(KeysError):
    """There is none where one should be."""


class KeyRecord(BaseModel):
    """What is known of one key.

    `requests_per_minute`, `tokens_per_minute` (prompt and generated), `concurrency` (requests at once): None is no
    limit. `priority`: the highest that its requests may have, lower is sooner. `isolated`: its requests share cached
    blocks with no other key's, and get a fair share of the engines. `operator`: it opens the operator's routes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(pattern=f"^{_NAME}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrency: Limit | None = None
    priority: int = 0
    isolated: bool = False
    operator: bool = False


class Keys(BaseModel):
    """All keys of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    keys: tuple[KeyRecord, ...] = ()

    @model_validator(mode="after")
    def _tells_them_apart(self) -> "Keys":
        for what in ("name", "sha256"):
            values = [getattr(record, what) for record in self.keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {what}; remove one of them")
        return self

    def find(self, key: bytes) -> KeyRecord | None:
        """The record of a key, None if there is none.

        The time it takes tells nothing of the keys: every record is compared, each in constant time, and what is
        compared are hashes, of which the asker cannot choose the beginning.
        """
        digest = hashlib.sha256(key).hexdigest()
        found = None
        for record in self.keys:
            if hmac.compare_digest(record.sha256, digest):
                found = record
        return found

    def with_key(self, name: str, **limits: object) -> tuple["Keys", str]:
        """These and a new one; the new key itself, which is kept nowhere. Raises KeysError."""
        if any(record.name == name for record in self.keys):
            raise KeysError(f"there is a key {name!r} already; remove it first, or choose another name")
        key = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
        try:
            record = KeyRecord.model_validate(
                {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest()} | limits
            )
        except ValidationError as error:
            raise KeysError(_first(error)) from None
        return Keys(keys=(*self.keys, record)), key

    def without(self, name: str) -> "Keys":
        """Raises KeysError when there is no key of that name."""
        kept = tuple(record for record in self.keys if record.name != name)
        if len(kept) == len(self.keys):
            names = ", ".join(record.name for record in self.keys) or "none"
            raise KeysError(f"there is no key {name!r}; there are: {names}")
        return Keys(keys=kept)


class KeyFile:
    """A key file, named by the URI of a file as `cluster.storage.Store` takes those of folders; a bare path too.

    Every method raises KeysError.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        uri = os.fspath(uri)
        if has_credentials(uri):
            raise KeysError(
                "the key file's URI carries credentials; leave them out and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY on the cluster's nodes"
            )
        if "://" not in uri:
            uri = Path(uri).expanduser().absolute().as_uri()
        path, mark, options = uri.partition("?")
        folder, _, name = path.rpartition("/")
        self._name = unquote(name)
        try:
            if not self._name:
                raise ValueError(f"{path}: this names a folder; give the URI of a file in it")
            self._store = Store(f"{folder}/{mark}{options}")
        except ValueError as error:
            raise KeysError(f"the key file's URI: {error}") from None
        self.uri = uri

    def __str__(self) -> str:
        return self.uri

    def read_bytes(self) -> bytes:
        try:
            return self._store.read_bytes(self._name)
        except NotFound:
            raise NoKeyFile(f"there is no key file {self}; make one: caravan keys add NAME --file FILE") from None
        except (StorageError, ValueError) as error:
            raise KeysError(f"the key file {self} cannot be read: {error}") from None

    def read(self) -> Keys:
        return self.parse(self.read_bytes())

    def parse(self, data: bytes) -> Keys:
        try:
            return Keys.model_validate_json(data)
        except ValidationError as error:
            raise KeysError(f"the key file {self} is not one: {_first(error)}") from None

    @contextmanager
    def changing(self) -> Iterator[Callable[[Keys], None]]:
        """The block calls what it is given with the new keys; nobody else on this machine changes the file meanwhile.

        The file is replaced whole, and only its owner may read or write it.
        """
        path = self._store.local_path(self._name)
        if path is None:
            raise KeysError(f"the key file {self} is remote; change a local one and copy it there")
        try:
            path = path.resolve()  # what a symbolic link points to is replaced, not the link
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise KeysError(f"the key file {self} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield lambda keys: self._replace(path, keys, folder)
        finally:
            os.close(folder)

    def _replace(self, path: Path, keys: Keys, folder: int) -> None:
        text = json.dumps(keys.model_dump(mode="json", exclude_defaults=True) or {"keys": []}, indent=2) + "\n"
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            os.fsync(folder)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise KeysError(f"the key file {self} cannot be written: {error.strerror}") from error


class LiveKeys:
    """The keys of a file that may change while they are used. Raises KeysError when it cannot be read now; later the
    last keys that could be read stay."""

    def __init__(self, file: KeyFile) -> None:
        self._file = file
        self.uri = file.uri
        self._data = file.read_bytes()
        self._problem = ""
        self.keys = file.parse(self._data)

    async def refresh(self) -> None:
        """Reads the file again. A problem is logged once, and never raised."""
        try:
            data = await asyncio.to_thread(self._file.read_bytes)
            keys = self._file.parse(data) if data != self._data else self.keys
        except Exception as error:  # whatever it is, requests must be answered as before
            problem = str(error) if isinstance(error, KeysError) else f"{self._file}: {type(error).__name__}"
            if problem != self._problem:
                logger.warning("API keys stay as they were: %s", problem)
            self._problem = problem
            return
        self._problem = ""
        if data != self._data:
            self._data, self.keys = data, keys
            logger.info("API keys were read again: %d of them", len(keys.keys))


def check_keys(uri: str | os.PathLike[str]) -> str:
    """The key file's absolute URI. Raises KeysError unless it is there and has a key in it."""
    file = KeyFile(uri)
    if not file.read().keys:
        raise KeysError(f"the key file {file} has no key in it; add one: caravan keys add NAME --file FILE")
    return file.uri


def check_exposure(host: str, api_keys: str | None) -> None:
    """Raises ServeError when `host` opens the endpoint to other machines while everybody may ask."""
    if api_keys is None and not _is_loopback(host):
        raise ServeError(
            f"host={host} opens the endpoint to the network, and no API keys are set; give --api-key-file, or serve on "
            "127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _first(error: ValidationError) -> str:
    """The first problem, without the input: it may be a key that was put there by mistake."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
