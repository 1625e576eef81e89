"""A store's URI, taken apart and checked, and the file system it names. Others import it through `cluster.storage`."""

import os
import re
from dataclasses import dataclass, replace
from datetime import timedelta
from urllib.parse import parse_qsl, quote, unquote, unquote_to_bytes, urlsplit

import pyarrow.fs as pafs

from cluster.filesystem import TEMPORARY_PREFIX, FileSystem, LocalFiles, ObjectFiles

_OPTIONS = {"file": (), "s3": ("endpoint_override", "region", "scheme"), "gs": ("endpoint_override", "scheme")}
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_CONNECT_SECONDS = 5
_REQUEST_SECONDS = 60


class LocationError(ValueError):
    """A URI that names no store, or a path that leaves one. The message shows nothing that may be a secret."""


@dataclass(frozen=True)
class Location:
    """`{kind}://{user}:{password}@{bucket}{path}?{options}`, decoded; a file's bucket is empty.

    `path` starts with `/` and does not end with one; it is empty at the top of a bucket.
    """

    kind: str
    bucket: str
    path: str
    options: tuple[tuple[str, str], ...] = ()
    user: str = ""
    password: str = ""

    @classmethod
    def parse(cls, uri: str) -> "Location":
        """Raises LocationError. A bare path is made absolute."""
        if not uri or "\0" in uri:
            raise LocationError(
                f"a store's URI {'has a zero byte in it' if uri else 'is empty'}; give a folder, file:///dir, "
                "s3://bucket/prefix or gs://bucket/prefix"
            )
        check_slashes(uri)
        if "://" not in uri:
            return cls("file", "", os.path.abspath(os.path.expanduser(uri)).rstrip("/"))
        try:
            parts = urlsplit(uri)
        except ValueError:  # its message may show the credentials
            raise LocationError(f"{uri.partition('://')[0]}://***: this is no URI; write s3://bucket/prefix") from None
        credentials, _, host = parts.netloc.rpartition("@")
        shown = f"{parts.scheme}://***" if ":" in host else f"{parts.scheme}://{host}{parts.path}"
        if parts.scheme not in _OPTIONS:
            raise LocationError(f"{shown}: unknown scheme {parts.scheme!r}; use file://, s3:// or gs://")
        if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
            raise LocationError(f"{shown}: a file URI needs an absolute path: file:///dir")
        if parts.scheme != "file" and not host:
            raise LocationError(f"{shown}: the bucket is missing; write {parts.scheme}://bucket/prefix")
        if ":" in host:
            raise LocationError(
                f"{shown}: a bucket's name has no ':'; leave credentials out of the URI, the environment gives them "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        if parts.fragment:
            raise LocationError(f"{shown}: '#' starts a fragment, which a store has not; write %23 for a literal '#'")
        options = tuple(parse_qsl(parts.query, keep_blank_values=True))
        known = _OPTIONS[parts.scheme]
        for name, value in options:
            if name not in known:  # its value is not shown: it might be somebody's secret_key
                allowed = ", ".join(known) or "none"
                raise LocationError(f"{shown}: unknown option {name!r}; {parts.scheme}:// takes {allowed}")
            if "@" in value:
                raise LocationError(f"{shown}: option {name} has an '@' in it; leave credentials out of it")
        # a name on disk is bytes
        raw = unquote_to_bytes(os.fsencode(parts.path))
        path = (os.fsdecode(raw) if parts.scheme == "file" else raw.decode(errors="replace")).rstrip("/")
        if path:
            checked(path[1:])
        user, _, password = credentials.partition(":")
        if parts.scheme == "gs" and credentials not in ("", "anonymous"):
            raise LocationError(f"{shown}: credentials in a gs:// URI; set GOOGLE_APPLICATION_CREDENTIALS instead")
        return cls(parts.scheme, host, path, options, unquote(user), unquote(password))

    def child(self, path: str) -> "Location":
        return replace(self, path=f"{self.path}/{checked(path)}")

    def key(self, path: str = "") -> str:
        """The whole path of `path` in this location, as its file system wants it."""
        root = self.bucket + self.path
        return f"{root}/{checked(path)}" if path else root or "/"

    def uri(self, secrets: bool = False) -> str:
        """The URI; without `secrets` credentials are shown as `***`."""
        credentials = ""
        if self.user:
            credentials = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@" if secrets else "***@"
            if self.kind == "gs":
                credentials = "anonymous@"
        query = "&".join(f"{name}={quote(value, safe=':/')}" for name, value in self.options)
        return f"{self.kind}://{credentials}{self.bucket}{quote(os.fsencode(self.path))}{'?' if query else ''}{query}"

    def shown(self) -> str:
        """`uri` for a message, with the signs of a glob as they were written."""
        return re.sub("%2A|%5B|%5D|%21", lambda found: unquote(found[0]), self.uri())

    @property
    def keyless(self) -> bool:
        """True if neither the URI nor the environment has a key for S3; the machine may still have a role."""
        return self.kind == "s3" and not (self.user or set(_KEYS) & os.environ.keys())

    @property
    def cloud(self) -> bool:
        """True if no endpoint is named, so that it is the cloud's own."""
        return self.kind != "file" and "endpoint_override" not in dict(self.options)

    def connect(self) -> FileSystem:
        """Raises OSError if the bucket's region cannot be found out."""
        if self.kind == "file":
            return LocalFiles()
        options = dict(self.options)
        if self.kind == "gs":
            limit = timedelta(seconds=_REQUEST_SECONDS)
            return ObjectFiles(pafs.GcsFileSystem(anonymous=bool(self.user), retry_time_limit=limit, **options))
        region = options.pop("region", None)
        if region is None:
            # another endpoint knows no AWS regions; AWS itself is asked where the bucket lies
            region = "us-east-1" if "endpoint_override" in options else pafs.resolve_s3_region(self.bucket)
        return ObjectFiles(
            pafs.S3FileSystem(
                access_key=self.user or None,
                secret_key=self.password or None,
                region=region,
                connect_timeout=_CONNECT_SECONDS,
                request_timeout=_REQUEST_SECONDS,
                # without it every small write is several requests; a missing bucket then shows at the first close
                allow_delayed_open=True,
                **options,
            )
        )


def check_slashes(uri: str) -> None:
    """Raises LocationError for `s3:/bucket`, which would be a folder called `s3:`."""
    scheme, colon, rest = uri.partition(":")
    if colon and scheme.lower() in _OPTIONS and rest.startswith("/") and not rest.startswith("//"):
        meant = f"{scheme.lower()}://{'' if scheme.lower() == 'file' else 'bucket'}/prefix"
        raise LocationError(f"{scheme}:/***: one slash after {scheme}:; write {meant}, or ./{scheme}: for a folder")


def has_credentials(uri: str) -> bool:
    """Whether `uri` holds a user or a password, well-formed or not; a bare path and `gs://anonymous@` do not."""
    scheme, separator, rest = uri.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if not separator or (scheme.lower(), authority.rpartition("@")[0]) == ("gs", "anonymous"):
        return False
    # a bucket has no port: the rest of a password with a '/' in it was taken for the path
    return "@" in authority or (":" in authority and scheme.lower() in ("s3", "gs"))


def checked(path: str) -> str:
    """`path` if it is a plain relative one. Raises LocationError for anything that could leave the store."""
    for part in path.split("/"):
        if part in ("", ".", "..") or "\0" in part:
            raise LocationError(f"path {path!r} is not a plain relative path; use names separated by '/', without '..'")
        if part.startswith(TEMPORARY_PREFIX):
            raise LocationError(f"path {path!r}: names that start with {TEMPORARY_PREFIX} are for files being written")
    return path
