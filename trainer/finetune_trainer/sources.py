"""From a URI of a job to a file system and a path on it, one of:

    pvc://claim/path                 the claim's mount
    configMap name, key              the ConfigMap's mount
    s3://bucket/path                 S3, with the keys of the Secret, or without one the pod's own identity
    hf://datasets/owner/name/path    the hub, with the token of the Secret
    file://path                      this machine, in local runs only

A path never leaves the claim or ConfigMap that it names, neither by `..` nor by a symbolic link. Credentials are read from mounted files
when they are needed, so that one that was renewed is used; they appear in no message. Models of the hub are in `model_files`.
"""

import posixpath
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import tenacity
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from finetune_api.allow_list import is_one_of
from finetune_api.endpoint_bounds import EndpointBounds
from finetune_api.reasons import Reason
from finetune_api.scrub import hide
from finetune_api.v1alpha1 import DataSource, Output
from finetune_trainer.errors import JobError

T = TypeVar("T")

RETRY_WAIT: tenacity.wait.wait_base = tenacity.wait_random_exponential(multiplier=2, max=30)
"""Pause before a failed call is tried again."""
PUBLIC_KEYS = ("region", "endpoint")
"""Keys of a Secret whose values may be told."""
_S3_TRANSIENT = ("NETWORK_CONNECTION", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "REQUEST_TIMEOUT", "INTERNAL_FAILURE", "THROTTLING")
_S3_REFUSED = ("INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID", "UNRECOGNIZED_CLIENT", "EXPIRED_TOKEN")


@dataclass(frozen=True)
class Mounts:
    """Where the pod's volumes are: `claims/<claim>`, `configmaps/<name>/<key>`, `secrets/<name>/<key>` under one root."""

    root: Path
    local: bool = False
    """Whether this is a run on one machine, where `file://` is allowed."""
    bounds: EndpointBounds | None = None
    """What the job's profile says of the S3 servers that Secrets name."""

    def claim(self, name: str) -> Path:
        """The claim's folder. Raises JobError (VolumeClaimNotFound)."""
        path = self.root / "claims" / name
        if not path.is_dir():
            raise JobError(Reason.VOLUME_CLAIM_NOT_FOUND, f"the PersistentVolumeClaim {name} is not mounted")
        return path

    def config_map(self, name: str, key: str) -> Path:
        """The file of one key. Raises JobError (ConfigMapNotFound)."""
        path = self.root / "configmaps" / name / key
        if not path.is_file():
            raise JobError(Reason.CONFIG_MAP_NOT_FOUND, f"the ConfigMap {name} has no key {key}")
        return path

    def secret(self, name: str, key: str, *, optional: bool = False) -> str | None:
        """The value of one key, without space around it. Raises JobError (SecretNotFound) where it is absent and not optional."""
        try:
            value = (self.root / "secrets" / name / key).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            value = ""
        if not value and not optional:
            raise JobError(Reason.SECRET_NOT_FOUND, f"the Secret {name} has no key {key}")
        if key not in PUBLIC_KEYS:
            hide(value)
        return value or None


@dataclass(frozen=True)
class Location:
    """A file or folder on a file system."""

    filesystem: AbstractFileSystem
    path: str
    """Path on that file system, without a slash at its end."""
    uri: str
    """The place as the job names it, for messages and the status."""

    def local_path(self) -> Path | None:
        """The path on this machine's file system, or None where it is elsewhere."""
        return Path(self.path) if isinstance(self.filesystem, LocalFileSystem) else None

    def child(self, name: str) -> "Location":
        """A place below this one."""
        return Location(self.filesystem, f"{self.path}/{name}", f"{self.uri.rstrip('/')}/{name}")


def resolve_data(source: DataSource, mounts: Mounts) -> Location:
    """Where a data source is. Raises JobError."""
    if source.config_map is not None:
        name, key = source.config_map.name, source.config_map.key
        path = mounts.config_map(name, key)
        return Location(LocalFileSystem(), str(_inside(path, path.parent, f"configMap {name}")), f"configMap {name}/{key}")
    assert source.source is not None  # noqa: S101 - the spec's own rule
    return resolve(source.source, mounts, source.secret_ref.name if source.secret_ref else None)


def resolve_storage(output: Output, mounts: Mounts) -> Location:
    """Where the output storage is: a job that runs names one, or its profile did. Raises JobError."""
    if output.storage is None:
        raise JobError(Reason.INVALID_SPEC, "output.storage is not set")
    return resolve(output.storage, mounts, output.secret_ref.name if output.secret_ref else None)


def resolve(uri: str, mounts: Mounts, secret: str | None = None) -> Location:
    """Where a URI leads. Nothing is read but credentials; the place itself may not exist. Raises JobError."""
    scheme, _, rest = uri.partition("://")
    if ".." in rest.split("/"):
        raise JobError(Reason.INVALID_SPEC, f"{uri}: a URI must not contain '..'")
    rest = rest.rstrip("/") if rest.strip("/") else rest
    if scheme == "pvc":
        claim, _, path = rest.partition("/")
        root = mounts.claim(claim)
        return Location(LocalFileSystem(), str(_inside(root / path, root, uri)), uri)
    if scheme == "file" and mounts.local:
        return Location(LocalFileSystem(), str(Path(rest).resolve()), uri)
    if scheme == "s3":
        return Location(_s3(mounts, secret), rest, uri)
    if scheme == "hf":
        return Location(_hub(mounts, secret), rest, uri)
    raise JobError(Reason.INVALID_SPEC, f"{uri}: {scheme or 'a URI without a scheme'} is not supported here")


def hub_token(mounts: Mounts, secret: str | None) -> str | None:
    """The hub's token, where the job names a Secret. Raises JobError (SecretNotFound)."""
    return mounts.secret(secret, "token") if secret else None


def _inside(path: Path, root: Path, uri: str) -> Path:
    """The path with every symbolic link followed. Raises JobError where it leaves the root."""
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
        raise JobError(Reason.INVALID_SPEC, f"{uri}: a symbolic link leads out of the volume")
    return real


def files_under(location: Location) -> tuple[Location, ...]:
    """The files of a folder and of those below it in the order of their paths, or the file itself; hidden ones are left out.

    Raises FileNotFoundError, and JobError where a symbolic link leads out of the folder.
    """
    files = location.filesystem
    if files.info(location.path)["type"] == "file":  # not isfile, which takes a refusal for an absence
        return (location,)
    root = location.local_path()
    found = []
    for path in sorted(files.find(location.path)):
        name = posixpath.relpath(path, location.path)
        if any(part.startswith((".", "_")) for part in name.split("/")):
            continue
        if root is not None:
            _inside(Path(path), root, f"{location.uri}/{name}")
        found.append(Location(files, path, f"{location.uri.rstrip('/')}/{name}"))
    return tuple(found)


def _s3(mounts: Mounts, secret: str | None) -> AbstractFileSystem:
    """S3 by pyarrow, which needs no botocore; without a Secret it takes the pod's own identity."""
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem

    options: dict[str, Any] = {"connect_timeout": 10.0, "request_timeout": 60.0}
    if secret is not None:
        options["access_key"] = mounts.secret(secret, "accessKeyId")
        options["secret_key"] = mounts.secret(secret, "secretAccessKey")
        region, server = mounts.secret(secret, "region", optional=True), _server(mounts, secret)
        if region:
            options["region"] = region
        if server:
            options |= {"scheme": server[0], "endpoint_override": server[1]}
            options.setdefault("region", "us-east-1")
    return ArrowFSWrapper(S3FileSystem(**options))


def _server(mounts: Mounts, secret: str) -> tuple[str, str] | None:
    """Scheme and host[:port][/path] of the S3 server that a Secret names; None is AWS. Raises JobError (InvalidSpec, ProfileViolated).

    What the profile allows is compared with just what S3's client is given. A path on an allowed server is not allowed with it: the client
    puts it before the bucket, so it would be another bucket.
    """
    endpoint = mounts.secret(secret, "endpoint", optional=True)
    if not endpoint:
        return None
    try:
        parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        is_url = parts.scheme in ("http", "https") and bool(parts.netloc) and not parts.username
    except ValueError:
        is_url = False
    if not is_url:
        raise JobError(Reason.INVALID_SPEC, f"the endpoint in the Secret {secret} must be http://host[:port] or https://host[:port]")
    scheme, place, bounds = parts.scheme, parts.netloc + parts.path.rstrip("/"), mounts.bounds
    if bounds is not None and secret in bounds.secrets and not is_one_of(bounds.allowed, f"{scheme}://{place}"):
        what = f"the key endpoint of the Secret {secret} names an S3 server"
        raise JobError(Reason.PROFILE_VIOLATED, f"{what} that the profile {bounds.profile} does not allow (allow.s3Endpoints)")
    return scheme, place


def check_servers(mounts: Mounts) -> None:
    """Raise JobError (ProfileViolated) where a Secret names an S3 server that the job's profile does not allow. Nothing is asked."""
    for secret in mounts.bounds.secrets if mounts.bounds else ():
        _server(mounts, secret)


def _hub(mounts: Mounts, secret: str | None) -> AbstractFileSystem:
    from huggingface_hub import HfFileSystem

    # False, not None: never a token that happens to lie in the pod's home.
    return HfFileSystem(token=hub_token(mounts, secret) or False, skip_instance_cache=True)


def patiently(call: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
    """The call's result; failures of the network are tried again, four times within half a minute. The last one is raised as it is."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        stop=tenacity.stop_after_attempt(5),
        wait=RETRY_WAIT,
        sleep=sleep,
        reraise=True,
    )
    return retrying(call)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    status = _http_status(error)
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return type(error).__name__ != "OfflineModeIsEnabled"
    if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):  # of the hub's HTTP client, which is not imported for this
        return True
    return any(f"AWS Error {sign}" in str(error) for sign in _S3_TRANSIENT)


def explained(error: Exception, uri: str, missing: Reason) -> JobError:
    """What to tell the user about a failure to read a place. `missing` is the reason where there is nothing."""
    if isinstance(error, JobError):
        return error
    status, text, name = _http_status(error), str(error), type(error).__name__
    is_gated = "GatedRepoError" in (name, type(error.__cause__).__name__)
    if is_gated or status == 403 or "ACCESS_DENIED" in text or isinstance(error, PermissionError):
        return JobError(Reason.AUTHENTICATION_FAILED, f"{uri}: access is denied")
    if status == 401 and name == "RepositoryNotFoundError":
        return JobError(missing, f"{uri} does not exist, or secretRef names no token that may read it")
    if status == 401 or any(sign in text for sign in _S3_REFUSED):
        return JobError(Reason.AUTHENTICATION_FAILED, f"{uri}: the credentials are not accepted")
    if status == 404 or isinstance(error, FileNotFoundError) or "NO_SUCH_BUCKET" in text or "NO_SUCH_KEY" in text:
        return JobError(missing, f"{uri} does not exist")
    reason = Reason.STORAGE_UNAVAILABLE if isinstance(error, OSError) or is_transient(error) else Reason.INTERNAL_ERROR
    return JobError(reason, f"{uri} cannot be read: {name}: {text.splitlines()[0] if text else 'no message'}")


def _http_status(error: BaseException) -> int | None:
    """The HTTP status that an error of the hub carries."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
