"""Who may call what: API keys, where the router was given some, and what a call of each kind needs.

Without keys everybody is the anonymous caller and may do everything, as it should be on a laptop's loopback. What is not in
the tables needs the strongest permission, so that nothing new is open by oversight.
"""

from __future__ import annotations

from pathlib import Path

from router.caller import ANONYMOUS, Caller, CallerLimits
from router.console.files import FILES, WITH_SLASH
from router.file_watch import follow, stamp_of
from segue.api_keys import PERMISSIONS, ApiKey, Permission, find_key, read_keys
from segue.cluster_secret import ClusterSecret, cache_salt
from segue.errors import PermissionDenied, Unauthenticated

_HOW = "send it as: Authorization: Bearer segue_..."
# One of these is needed; none at all where the set is empty.
Needs = frozenset[Permission]
_OPEN: Needs = frozenset()
_ANY: Needs = frozenset(PERMISSIONS)
_INFER: Needs = frozenset({"infer"})
_OBSERVE: Needs = frozenset({"observe"})
_OPERATE: Needs = frozenset({"operate"})
_WATCH: Needs = _OBSERVE | _OPERATE

# Health is for load balancers and kubelets, which have no key. Metrics tell how much others use the cluster.
# The console's files hold nothing; what it shows tells about the requests of others.
_HTTP_PATHS: dict[str, Needs] = {
    "/health": _OPEN,
    "/ready": _OPEN,
    "/metrics": _OBSERVE,
    "/console/state": _WATCH,
    **dict.fromkeys((*FILES, WITH_SLASH), _OPEN),
}
# By rpc, or by service. Clients wait for a cluster by its status.
_GRPC_METHODS: dict[str, Needs] = {
    "/segue.v1.InferenceService/GetClusterStatus": _ANY,
    "/segue.v1.InferenceService": _INFER,
    "/segue.v1.OperatorService/GetOverview": _WATCH,
    "/grpc.health.v1.Health": _OPEN,
    # Tells what the public .proto files say.
    "/grpc.reflection.v1alpha.ServerReflection": _OPEN,
}


def http_needs(path: str) -> Needs:
    return _HTTP_PATHS.get(path, _INFER if path.startswith("/v1/") else _OPERATE)


def grpc_needs(method: str) -> Needs:
    """`method` is /package.Service/Method."""
    service = method.rpartition("/")[0]
    return _GRPC_METHODS.get(method, _GRPC_METHODS.get(service, _OPERATE))


class Access:
    """`keys_file` None: everybody may do everything. Raises ConfigError, when made, for a file that cannot be read."""

    def __init__(self, keys_file: Path | None, secret: ClusterSecret | None) -> None:
        self._secret = secret
        self._files = [] if keys_file is None else [keys_file]
        self._stamp = stamp_of(self._files)
        self._keys: tuple[ApiKey, ...] = ()
        self._load()

    def _load(self) -> None:
        self._keys = tuple(key for file in self._files for key in read_keys(file))

    async def follow(self) -> None:
        """Takes changes of the file over: new keys serve, and revoked ones are refused, within a second. Until cancelled."""
        if self._files:
            await follow(self._files, self._load, self._stamp)

    def caller(self, authorization: str | None, needs: Needs) -> Caller:
        """Raises Unauthenticated or PermissionDenied. Calls under way are not asked again."""
        if not self._files or not needs:
            return ANONYMOUS
        key = self._key(authorization)
        if not needs.intersection(key.permissions):
            raise PermissionDenied(
                f"API key {key.name!r} is for {', '.join(key.permissions)}; this needs {' or '.join(sorted(needs))}"
            )
        limits = CallerLimits(key.requests_per_minute, key.tokens_per_minute, key.best_priority)
        return Caller(
            tenant=key.tenant,
            weight=key.weight,
            priority=key.best_priority,
            cache_salt=cache_salt(key.tenant, self._secret),
            key_id=key.key_id,
            limits=limits,
        )

    def _key(self, authorization: str | None) -> ApiKey:
        if not authorization:
            raise Unauthenticated(f"this cluster needs an API key; {_HOW}")
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated(f"the Authorization header is of another kind than Bearer; {_HOW}")
        key = find_key(self._keys, text.strip())
        if key is None:
            raise Unauthenticated("the API key is not known, or was revoked")
        return key
