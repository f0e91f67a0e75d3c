"""Both APIs over TLS, with certificates made on the fly."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from deploy.probe import ask, own_tls
from router.tls import ServerTls, TlsFiles
from segue import AsyncClient
from segue.client import Access, RetryPolicy
from segue.config import ClusterSettings
from segue.errors import ConfigError, Unreachable

ONCE = RetryPolicy(max_attempts=1)


class Pki:
    """An authority, the router's certificate and a client's."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.authority = trustme.CA()
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        self.client_cert, self.client_key = folder / "client.pem", folder / "client-key.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))
        self.issue(self.cert, self.key, "127.0.0.1")
        self.issue(self.client_cert, self.client_key, "someone@example.org")

    def issue(self, cert: Path, key: Path, name: str) -> None:
        issued = self.authority.issue_cert(name)
        issued.private_key_pem.write_to_path(str(key))
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))

    @property
    def server(self) -> dict[str, Path]:
        return {"tls_cert": self.cert, "tls_key": self.key}

    @property
    def client(self) -> Access:
        return Access(ca=self.ca, cert=self.client_cert, key=self.client_key)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


async def health(address: str, pki: Pki, *, with_certificate: bool = False) -> int:
    context = ssl.create_default_context(cafile=pki.ca)
    if with_certificate:
        context.load_cert_chain(pki.client_cert, pki.client_key)
    async with httpx.AsyncClient(verify=context, trust_env=False) as http:
        return (await http.get(f"https://{address}/health")).status_code


async def test_both_apis_speak_tls_and_nothing_else(serve, say, pki):
    async with serve(say("hi"), **pki.server) as running:
        address = running.front.grpc_address
        async with AsyncClient(f"grpcs://{address}", access=Access(ca=pki.ca)) as client:
            assert (await client.models())[0].id
        assert await health(running.front.http_address, pki) == 200
        with pytest.raises(httpx.HTTPError):
            await running.http.get("/health")
        async with AsyncClient(address, access=Access(), retry=ONCE) as client:
            with pytest.raises(Unreachable):
                await client.models()


async def test_a_client_that_does_not_trust_the_authority_goes_no_further(serve, say, pki, tmp_path):
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    async with serve(say("hi"), **pki.server) as running:
        for access in (Access(ca=other), Access()):
            async with AsyncClient(f"grpcs://{running.front.grpc_address}", access=access, retry=ONCE) as client:
                with pytest.raises(Unreachable):
                    await client.models()


async def test_mutual_tls_lets_in_whom_the_authority_has_signed(serve, say, pki):
    async with serve(say("hi"), **pki.server, tls_client_ca=pki.ca) as running:
        address = running.front.grpc_address
        async with AsyncClient(f"grpcs://{address}", access=pki.client) as client:
            assert (await client.models())[0].id
        assert await health(running.front.http_address, pki, with_certificate=True) == 200
        async with AsyncClient(f"grpcs://{address}", access=Access(ca=pki.ca), retry=ONCE) as client:
            with pytest.raises(Unreachable):
                await client.models()
        with pytest.raises((httpx.HTTPError, ssl.SSLError)):
            await health(running.front.http_address, pki)


async def test_a_new_certificate_serves_new_connections_and_a_broken_one_does_not(serve, say, pki):
    async with serve(say("hi"), **pki.server) as running:
        tls = running.front._tls
        pki.issue(pki.cert, pki.key, "127.0.0.1")
        tls._reload()
        pinned = own_tls(ClusterSettings(**pki.server), Access())
        assert (await asyncio.to_thread(ask, running.front.http_address, "/health", 10, pinned)).is_ok
        pki.key.write_text("no key")
        with pytest.raises(ConfigError, match="tls_key"):
            tls._reload()
        assert (await asyncio.to_thread(ask, running.front.http_address, "/health", 10, pinned)).is_ok
        async with AsyncClient(f"grpcs://{running.front.grpc_address}", access=Access(ca=pki.ca)) as client:
            assert (await client.models())[0].id


async def test_grpc_shows_the_new_certificate_to_new_connections(serve, say, pki, tmp_path):
    other = Pki(tmp_path / "other")
    async with serve(say("hi"), **pki.server) as running:
        pki.cert.write_bytes(other.cert.read_bytes())
        pki.key.write_bytes(other.key.read_bytes())
        running.front._tls._reload()
        async with AsyncClient(f"grpcs://{running.front.grpc_address}", access=Access(ca=other.ca), retry=ONCE) as client:
            assert (await client.models())[0].id


@pytest.mark.parametrize("spoiled", ["tls_cert", "tls_key", "tls_client_ca"])
@pytest.mark.parametrize("content", [None, "no certificate"])
def test_bad_files_are_refused_by_the_setting(pki, spoiled, content):
    files = {"tls_cert": pki.cert, "tls_key": pki.key, "tls_client_ca": pki.ca}
    if content is None:
        files[spoiled].unlink()
    else:
        files[spoiled].write_text(content)
    with pytest.raises(ConfigError, match=spoiled):
        ServerTls(TlsFiles(pki.cert, pki.key, pki.ca))
