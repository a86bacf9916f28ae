"""The Kubernetes API: the only client code of the operator. Reads a job and what belongs to it, writes its status and its objects.

Every call has a time limit, and what the client may repeat without harm (GET, PUT, DELETE) it repeats with backoff;
a POST or PATCH that fails is left to the next reconcile. What is asked of the API server at all stands in `kinds`.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
from kubernetes.aio.client import ApiClient

from finetune_api import API_VERSION, GROUP, KIND, LABEL_JOB_NAME, LABEL_JOB_UID, PLURAL
from finetune_api.profile import PROFILE_PLURAL
from finetune_api.report import REPORT_PORT, Report
from finetune_api.status import Status
from finetune_operator.clock import Looks
from finetune_operator.connection import Login, log_in
from finetune_operator.heads import Heads
from finetune_operator.kinds import KINDS, PROFILES, Kind, kinds_with
from finetune_operator.observed import Pod, head_name
from finetune_operator.port import ApiError, Conflict, Event, JobKey, RawJob, Refused, TooLarge
from finetune_operator.settings import GangScheduler, Settings

FIELD_MANAGER = "finetune-operator"
"""Owner of the fields that the operator writes, as `kubectl get --show-managed-fields` tells."""
REQUEST_SECONDS = 15.0
"""Longest wait for one answer of the API server."""
LINE_BYTES = 1 << 20
"""Of a line of a log that does not end, so much is kept."""
EVENT_PODS = 3
"""Pending pods whose Events are read; the others wait for the same things."""
EVENT_AFTER = timedelta(seconds=10)
"""How long a pod that has a node is pending before its Events are read: API servers keep no cache of Events, so a pod's are looked for
among all of the namespace's. Why a pod has no node stands in its own conditions."""

log = logging.getLogger(__name__)

OnCall = Callable[[str, int, float], None]
"""Told of each call's verb, HTTP status (0: no answer) and seconds."""


@contextlib.asynccontextmanager
async def connect(
    report_port: int = REPORT_PORT,
    on_call: OnCall = lambda *_: None,
    scheduler: GangScheduler = "none",
    context: str = "",
    poll_seconds: float = Settings.poll_seconds,
) -> AsyncIterator["KubernetesCluster"]:
    """The cluster that KUBECONFIG names, or the one around this pod, or that of the user's kubeconfig; or of a context of these.

    Raises kubernetes.config.ConfigException where none of them can be used.
    """
    login = await log_in(context)
    async with ApiClient(login.configuration) as client, Heads(report_port) as heads:
        yield KubernetesCluster(client, heads, on_call, login, Looks(poll_seconds), kinds_with(scheduler))


class KubernetesCluster:
    """The port of `reconcile`, on a real API server."""

    def __init__(
        self, client: ApiClient, heads: Heads, on_call: OnCall, login: Login, looks: Looks, kinds: Mapping[str, Kind] = KINDS
    ) -> None:
        self.client = client
        self._login, self._looks = login, looks
        self._heads = heads
        self._on_call = on_call
        self._kinds = kinds

    async def read(self, key: JobKey) -> RawJob | None:
        """The job as it is now, and what belongs to it: three requests, and one for each of the first few pods that are stuck.

        Lists come from the API server's watch cache, since one by label read past it has the server go through every pod of the
        namespace in etcd. Such a list may be a moment old, and what it shows wakes the job again once it is newer; but nothing may
        follow from what it lacks. So where absence decides, the API server is asked again: for the head, without which an attempt
        has ended, and for everything between attempts, since the next one begins when the pods of the last have gone.
        """
        namespace, name = key
        job = await self._get_or_none(KINDS[KIND].path(namespace, name), f"{KIND} {namespace}/{name}")
        if job is None:
            self._looks.forget(key)
            return None
        status = Status.model_validate(job.get("status") or {})
        between = status.attempt.number > 0 and not status.attempt.running and not status.finished
        query = {"labelSelector": f"{LABEL_JOB_UID}={job['metadata']['uid']}", **({} if between else _FROM_CACHE)}
        pods, config_maps = await asyncio.gather(
            self._list("Pod", namespace, query), self._list("ConfigMap", namespace, query, metadata_only=True)
        )
        head = head_name(name, status.attempt.number)
        if status.attempt.running and head not in [pod["metadata"]["name"] for pod in pods]:
            found = await self._get_or_none(KINDS["Pod"].path(namespace, head), f"Pod {namespace}/{head}")
            pods += [found] if found and found["metadata"].get("labels", {}).get(LABEL_JOB_UID) == job["metadata"]["uid"] else []
        pending = [pod["metadata"]["uid"] for pod in pods if _is_stuck(pod, datetime.now(UTC))][:EVENT_PODS]
        lists = await asyncio.gather(*(self._list("Event", namespace, {"fieldSelector": f"involvedObject.uid={uid}"}) for uid in pending))
        told = [event for events in lists for event in events]
        profiles = await self._profiles(status)
        return RawJob(job=job, pods=pods, config_maps=config_maps, events=told, profiles=profiles, looked=self._looks.seen(key))

    async def _profiles(self, status: Status) -> list[dict[str, Any]]:
        """The profiles, for a job that has yet to be told under which one it runs: past the cache, since the absence of one decides."""
        known = status.resolved is not None and status.resolved.profile is not None
        if known or status.attempt.number > 0 or status.finished:
            return []
        return list((await self.call("list", PROFILES, PROFILE_PLURAL)).get("items") or [])

    async def fetch_report(self, pod: Pod, token: str, after: int, wait: float) -> Report | None:
        """What the head says of its work, or None where it says nothing that can be understood. Never raises for that.

        The head holds its answer back for up to `wait` seconds, until its revision is beyond `after`.
        """
        return await self._heads.report(pod, token, after, wait)

    async def patch_status(self, job: Mapping[str, Any], status: Status) -> dict[str, Any]:
        """Write the status as a whole, so that what it no longer says goes; the job as it is then.

        Raises Conflict where the job has changed since it was read, or is gone, and TooLarge.
        """
        meta = job["metadata"]
        kept = {name: meta[name] for name in ("name", "namespace", "uid", "resourceVersion")}
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": kept, "status": _without_blanks(status.to_json())}
        path = KINDS[KIND].path(meta["namespace"], meta["name"]) + "/status"
        try:
            return await self.call("update", path, f"{KIND} {meta['namespace']}/{meta['name']} status", body=body, query=_MANAGED)
        except ApiError as error:
            if error.status in (404, 409):
                raise Conflict(str(error)) from error
            if error.status == 413 or "too large" in str(error):  # etcd's words come with a 500, later servers' with a 413
                raise TooLarge(str(error)) from error
            if error.status == 422:
                words = f"{error}; is the CRD as new as the operator? Nothing is done for this job meanwhile"
                raise ApiError(error.status, error.reason, words) from error
            raise

    async def apply(self, manifest: Mapping[str, Any]) -> str:
        """Make the object, or bring in line the one that was made before; its UID. Pods and Secrets stay as they were made.

        Raises Refused where the cluster does not want the object (a quota, a policy, a missing permission), and where its name is
        taken by an object of somebody else's, such as that of a deleted job of the same name: what is not ours is never changed.
        Raises Conflict where a moment later it may be taken.
        """
        kind, namespace, name = manifest["kind"], manifest["metadata"]["namespace"], manifest["metadata"]["name"]
        what = f"{kind} {namespace}/{name}"
        try:
            made = await self.call("create", self._kinds[kind].path(namespace), what, body=manifest, query=_MANAGED)
        except ApiError as error:
            if error.reason == "AlreadyExists":
                return await self._bring_in_line(manifest, what)
            if error.status == 409:  # others count against the same quota just now
                raise Conflict(str(error)) from error
            if error.status in _REFUSALS:
                raise Refused(error.reason, str(error)) from error
            raise
        return str(made["metadata"]["uid"])

    async def _bring_in_line(self, manifest: Mapping[str, Any], what: str) -> str:
        kind, meta = manifest["kind"], manifest["metadata"]
        if kind == "Secret":
            return ""  # its name follows from the job's UID, so it is this job's
        path = self._kinds[kind].path(meta["namespace"], meta["name"])
        existing = await self._get_or_none(path, what)
        ours = (_owner(manifest).get("uid"), meta["labels"][LABEL_JOB_UID])  # its own owner, or its job
        if existing is None or _owner(existing).get("uid") not in ours:
            raise Refused("AlreadyExists", f"cannot create {what}: one that is not this job's exists, or is just going")
        if kind != "Pod":
            await self.call("patch", path, what, body=manifest, query=[*_MANAGED, ("force", "true")], media="application/apply-patch+yaml")
        return str(existing["metadata"]["uid"])

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str | None = None, grace: int | None = None) -> None:
        """Delete an object, or only the one with this UID. Its absence is no error. A pod gets its own grace period, or `grace` seconds.

        Where no UID is given, an object that no job owns is left alone.
        """
        path, what = self._kinds[kind].path(namespace, name), f"{kind} {namespace}/{name}"
        if uid is None and kind != "Secret":
            existing = await self._get_or_none(path, what)
            if existing is None or _owner(existing).get("kind") != KIND:
                return
            uid = existing["metadata"]["uid"]
        options: dict[str, Any] = {"propagationPolicy": "Background"}
        options |= {} if uid is None else {"preconditions": {"uid": uid}}
        options |= {} if grace is None else {"gracePeriodSeconds": grace}
        try:
            await self.call("delete", path, what, body=options)
        except ApiError as error:
            if error.status not in (404, 409):  # 409: an object of another UID, so this one is gone
                raise

    async def delete_pods(self, namespace: str, labels: Mapping[str, str], *, grace: int | None = None) -> None:
        """Delete every pod with these labels, in one request. Each gets its own grace period, or `grace` seconds."""
        options = {"propagationPolicy": "Background", **({} if grace is None else {"gracePeriodSeconds": grace})}
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        path = self._kinds["Pod"].path(namespace)
        await self.call("deletecollection", path, f"Pods with {selector}", query=[("labelSelector", selector)], body=options)

    async def try_job(self, job: Mapping[str, Any]) -> None:
        """Offer a job to the API server without making it. Raises ApiError where it would be refused."""
        namespace, what = job["metadata"]["namespace"], f"{KIND} {job['metadata']['namespace']}/{job['metadata']['name']}"
        await self.call("create", KINDS[KIND].path(namespace), what, body=job, query=[("dryRun", "All")])

    async def delete_job(self, job: Mapping[str, Any]) -> None:
        """Delete this very job, not another of the same name. What it owns goes with it."""
        meta = job["metadata"]
        await self.delete(KIND, meta["namespace"], meta["name"], uid=meta["uid"])

    async def emit(self, job: Mapping[str, Any], event: Event) -> None:
        """Tell the job's users of a transition. An Event that could not be written is logged, not tried again."""
        body = event_manifest(job, event, datetime.now(UTC))
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        try:
            await self.call("create", KINDS["Event"].path(namespace), f"Event {namespace}/{name}", body=body)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                log.warning("event not written: %s", error)

    async def jobs(self, namespace: str | None = None) -> list[dict[str, Any]]:
        """All jobs, of a namespace or of every one, as the API server has them."""
        (path,) = _job_lists([namespace] if namespace else [])
        return list((await self.call("list", path, KIND)).get("items") or [])

    async def check(self, namespaces: Sequence[str]) -> None:
        """Ask for one profile, and a job in each namespace (in all at once where none is named). Raises ApiError where that fails."""
        for path in (PROFILES, *_job_lists(namespaces)):
            await self.call("list", path, path.rsplit("/", 1)[1], query=[("limit", "1")])

    async def login(self) -> dict[str, Any]:
        """How another client of this API server logs in, with a token that is read anew: kopf.ConnectionInfo's arguments."""
        configuration = self.client.configuration
        scheme, _, token = (await self._login.renew() or "").strip().rpartition(" ")
        return {
            "server": configuration.host,
            "ca_path": configuration.ssl_ca_cert,
            "insecure": not configuration.verify_ssl,
            "scheme": scheme.capitalize() or None,
            "token": token or None,
            "username": configuration.username or None,
            "password": configuration.password or None,
            "certificate_path": configuration.cert_file,
            "private_key_path": configuration.key_file,
            "proxy_url": configuration.proxy,
        }

    def path(self, kind: str, namespace: str, name: str = "") -> str:
        """Where the API server has an object, or the list of a kind."""
        return self._kinds[kind].path(namespace, name)

    async def lines(self, path: str, what: str, query: Sequence[tuple[str, str]]) -> AsyncIterator[str]:
        """The lines of an answer, as they come, for as long as it takes. Raises ApiError."""
        request = await self.client.param_serialize("GET", path, query_params=list(query), auth_settings=["BearerToken"])
        rest = b""
        try:
            response = await self.client.call_api(*request, _request_timeout=aiohttp.ClientTimeout(total=None, sock_connect=5))
            if response.status >= 300:
                raise _api_error(response.status, await response.read(), f"cannot get {what}")
            async for chunk in response.response.content.iter_any():
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    yield line.decode(errors="replace")
                rest = rest[-LINE_BYTES:]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, "Unreachable", f"cannot get {what}: the API server went away ({error!r})") from error
        if rest:
            yield rest.decode(errors="replace")

    async def _list(self, kind: str, namespace: str, query: Mapping[str, str], *, metadata_only: bool = False) -> list[dict[str, Any]]:
        accept = METADATA_LIST if metadata_only else _JSON
        what = f"{KINDS[kind].plural} in {namespace}"
        answer = await self.call("list", KINDS[kind].path(namespace), what, query=list(query.items()), accept=accept)
        return list(answer.get("items") or [])

    async def _get_or_none(self, path: str, what: str) -> dict[str, Any] | None:
        try:
            return await self.call("get", path, what)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def call(
        self,
        verb: str,
        path: str,
        what: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: Mapping[str, Any] | None = None,
        media: str = "application/json",
        accept: str = "application/json",
    ) -> dict[str, Any]:
        """One request; its answer as JSON. Raises ApiError."""
        headers = {"Accept": accept, "Content-Type": media}
        request = await self.client.param_serialize(
            _METHODS[verb], path, query_params=list(query), header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        code, begun = 0, time.perf_counter()
        try:
            response = await self.client.call_api(*request, _request_timeout=_TIMEOUT)
            data = await response.read()
            code = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why = str(error) or type(error).__name__
            raise ApiError(0, "Unreachable", f"cannot {verb} {what}: no answer from the API server ({why})") from error
        finally:
            self._on_call(verb, code, time.perf_counter() - begun)
        if code >= 300:
            raise _api_error(code, data, f"cannot {verb} {what}")
        return dict(json.loads(data))


_REFUSALS = (400, 403, 404, 422)
"""What the server will answer again unless something changes: a quota, a policy, a permission, a namespace that goes."""
_METHODS = {
    "get": "GET",
    "list": "GET",
    "create": "POST",
    "patch": "PATCH",
    "update": "PUT",
    "delete": "DELETE",
    "deletecollection": "DELETE",
}
_TIMEOUT = aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=5)
_FROM_CACHE = {"resourceVersion": "0"}
_MANAGED = (("fieldManager", FIELD_MANAGER),)
_JSON = "application/json"
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


def _owner(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The reference to what controls an object; empty where nothing does."""
    owners = manifest["metadata"].get("ownerReferences") or ()
    return next((owner for owner in owners if owner.get("controller")), {})


def _is_stuck(pod: Mapping[str, Any], now: datetime) -> bool:
    """Whether a pod has a node and yet does not run: something that it mounts may be missing, which only its Events tell."""
    if pod.get("status", {}).get("phase") not in (None, "Pending") or not pod.get("spec", {}).get("nodeName"):
        return False
    return datetime.fromisoformat(pod["metadata"]["creationTimestamp"]) <= now - EVENT_AFTER


def _job_lists(namespaces: Sequence[str]) -> list[str]:
    """Paths of the lists of jobs in these namespaces, or of the one list of all."""
    return [KINDS[KIND].path(namespace) for namespace in namespaces] or [f"{KINDS[KIND].api}/{PLURAL}"]


def _api_error(code: int, data: bytes, what: str) -> ApiError:
    """The error in an answer: normally a Status object, but a proxy on the way may answer in its own words."""
    try:
        status = json.loads(data)
        reason, message = str(status.get("reason") or code), str(status.get("message") or "")
    except (ValueError, AttributeError):
        reason, message = str(code), data[:200].decode(errors="replace").strip()
    return ApiError(code, reason, f"{what}: {message or reason}")


def _without_blanks(value: Any) -> Any:  # noqa: ANN401 - JSON
    """JSON without empty strings: absent means the same here, and some API servers (1.20 of Debian) take one in a list for a null."""
    if isinstance(value, dict):
        return {key: _without_blanks(each) for key, each in value.items() if each != ""}
    return [_without_blanks(each) for each in value] if isinstance(value, list) else value


def event_manifest(job: Mapping[str, Any], event: Event, now: datetime) -> dict[str, Any]:
    """The Event object for a transition. Its name follows from the transition, so that a repeat is found to exist."""
    meta, time = job["metadata"], now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": event.name, "namespace": meta["namespace"], "labels": {LABEL_JOB_NAME: meta["name"]}},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "namespace": meta["namespace"],
            "name": meta["name"],
            "uid": meta["uid"],
            "resourceVersion": meta.get("resourceVersion"),
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:1024],
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": f"{GROUP}/{FIELD_MANAGER}",
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
