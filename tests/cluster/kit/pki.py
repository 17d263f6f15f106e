"""Certificates of the cluster, made new at every start, and the kubeconfigs that carry them."""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
import json
from pathlib import Path

from cluster.kit.versions import API_IP, NODE, NODE_IP
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

API = f"https://{NODE_IP}:6443"
DAYS = 30
Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]

USERS = {
    "admin": ("admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
    "jobset": ("system:serviceaccount:jobset-system:jobset-controller-manager", "system:serviceaccounts"),
    "kubelet": (f"system:node:{NODE}", "system:nodes"),
}
"""Kubeconfigs: user and group."""

_API_NAMES = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
_WEBHOOK = "jobset-webhook-service.jobset-system.svc"


def make(folder: Path) -> None:
    """Write all certificates, keys and kubeconfigs into ``folder``; each pair as NAME.crt and NAME.key."""
    folder.mkdir(parents=True, mode=0o700)
    ca, front = authority("ca"), authority("front-proxy-ca")
    _write(folder, "ca", ca)
    _write(folder, "front-proxy-ca", front)
    _write(folder, "apiserver", signed(ca, "kube-apiserver", names=_API_NAMES, addresses=("127.0.0.1", NODE_IP, API_IP)))
    _write(folder, "apiserver-kubelet-client", signed(ca, "kube-apiserver-kubelet-client", "system:masters"))
    _write(folder, "front-proxy-client", signed(front, "front-proxy-client"))
    _write(folder, "kubelet-server", signed(ca, NODE, names=(NODE,), addresses=(NODE_IP,)))
    webhook = folder / "jobset"
    webhook.mkdir()
    _write(webhook, "tls", signed(ca, _WEBHOOK, names=(_WEBHOOK, f"{_WEBHOOK}.cluster.local")))
    accounts = ec.generate_private_key(ec.SECP256R1())
    _key(folder / "sa.key", accounts)
    kinds = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "sa.pub").write_bytes(accounts.public_key().public_bytes(*kinds))
    for name, (user, group) in USERS.items():
        kubeconfig(folder / f"{name}.kubeconfig", ca, signed(ca, user, group))


def authority(name: str) -> Pair:
    """A certificate authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    built = _builder(subject, subject, key).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return built.add_extension(usage, critical=True).sign(key, hashes.SHA256()), key


def signed(by: Pair, user: str, group: str = "", *, names: tuple[str, ...] = (), addresses: tuple[str, ...] = ()) -> Pair:
    """A certificate: for a server when it has names or addresses, else for a client."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group)] if group else []
    subject.append(x509.NameAttribute(NameOID.COMMON_NAME, user))
    server = bool(names or addresses)
    usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    built = _builder(x509.Name(subject), by[0].subject, key).add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    if server:
        alternatives = [*map(x509.DNSName, names), *(x509.IPAddress(ipaddress.ip_address(a)) for a in addresses)]
        built = built.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return built.sign(by[1], hashes.SHA256()), key


def kubeconfig(path: Path, ca: Pair, pair: Pair) -> None:
    """A kubeconfig with everything in it: it can be copied."""
    user = {"client-certificate-data": _b64(_pem(pair)), "client-key-data": _b64(_pem_key(pair[1]))}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": API, "certificate-authority-data": _b64(_pem(ca))}}],
        "users": [{"name": "user", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "user"}}],
        "current-context": "test",
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    # An hour back: clocks of virtual machines jump.
    built = built.serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(hours=1))
    return built.not_valid_after(now + dt.timedelta(days=DAYS))


def _write(folder: Path, name: str, pair: Pair) -> None:
    (folder / f"{name}.crt").write_bytes(_pem(pair))
    _key(folder / f"{name}.key", pair[1])


def _key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.touch(mode=0o600)
    path.write_bytes(_pem_key(key))


def _pem(pair: Pair) -> bytes:
    return pair[0].public_bytes(serialization.Encoding.PEM)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    kinds = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.private_bytes(*kinds)


def _b64(content: bytes) -> str:
    return base64.b64encode(content).decode()
