"""TLS for the links between routers and workers, mutual, with certificates that are made from the cluster secret.

Every member derives the same certificate authority from the secret and gives itself a certificate of it: to have one is to have
the secret. The rest is TLS: encryption, forward secrecy, nothing to replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from segue.cluster_secret import ClusterSecret

# Members are told by the secret, not by their addresses.
_MEMBER = "member.segue.internal"
CHANNEL_OPTIONS = [("grpc.ssl_target_name_override", _MEMBER)]
# The order of P-256 (SEC 2, version 2.0, section 2.4.2).
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
# It is the secret that is changed, not the certificates: no clock of a member matters.
_BEGIN, _END = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class LinkCredentials:
    """What gRPC takes on either end of a link."""

    server: grpc.ServerCredentials
    channel: grpc.ChannelCredentials

    @classmethod
    def of(cls, secret: ClusterSecret) -> LinkCredentials:
        authority, certificate, key = _certificates(secret)
        return cls(
            grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True),
            grpc.ssl_channel_credentials(authority, key, certificate),
        )


def _certificates(secret: ClusterSecret) -> tuple[bytes, bytes, bytes]:
    """The authority's certificate, and a new one of this process with its key; PEM."""
    number = int.from_bytes(secret.key("link authority") + secret.key("link authority, further bits"))
    authority_key = ec.derive_private_key(number % (_ORDER - 1) + 1, ec.SECP256R1())
    authority_name = _name("Segue cluster")
    authority = (
        _builder(authority_name, authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = (
        _builder(_name("Segue member"), authority_name, key.public_key())
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_MEMBER)]), critical=False)
        .add_extension(usage, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return authority.public_bytes(pem), certificate.public_bytes(pem), private


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(_BEGIN).not_valid_after(_END)
