"""What a deployment trusts: its own authority, the server's certificate, a key for each node.

Everything is an elliptic-curve key on P-384, in the formats that Flower reads: certificates and
the server's key in PEM, the nodes' keys as OpenSSH writes them. Private files are readable by
their owner alone, from the moment they exist.

    python -m app.credentials FOLDER --hosts fl.example.org,10.0.0.5 --nodes 3
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from app.errors import UserError

#: How long a certificate holds, and an authority, which signs others when the first has ended.
DAYS, AUTHORITY_DAYS, MOST_DAYS = 825, 3650, 36500


def authority(folder: Path, days: int = AUTHORITY_DAYS) -> Path:
    """Make a certificate authority: ``ca.crt`` to hand out, ``ca.key`` to keep.

    Returns
    -------
    Path
        The certificate.

    Raises
    ------
    UserError
        If there is one already: everything it has signed would become worthless.
    """
    for file in (folder / "ca.crt", folder / "ca.key"):
        if file.exists():
            raise UserError(
                f"{file}: there is an authority already; it is not replaced"
            )
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fedgrad authority")
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    _private(folder / "ca.key", _pem(key))
    (folder / "ca.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    return folder / "ca.crt"


def server(folder: Path, hosts: Sequence[str], days: int = DAYS) -> tuple[Path, Path]:
    """Make the SuperLink's certificate, signed by the folder's authority.

    Parameters
    ----------
    folder : Path
        Where ``ca.crt`` and ``ca.key`` are; ``server.pem`` and ``server.key`` go there.
    hosts : sequence of str
        Every name and address by which nodes and people reach the SuperLink: what stands in the
        certificate is what a client accepts.
    days : int
        How long it holds.

    Returns
    -------
    tuple of Path
        Certificate and key.

    Raises
    ------
    UserError
        If no host is named, or the authority's key is elsewhere or ends earlier.
    """
    if not hosts or not all(hosts):
        raise UserError("hosts: name every address by which the SuperLink is reached")
    for file in (folder / "ca.key", folder / "ca.crt"):
        if not file.exists():
            raise UserError(f"{file}: the authority's is needed to sign; bring it")
    try:
        issuer = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        signer = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}/ca.key or ca.crt: {error}") from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise UserError(f"{folder}/ca.key: an elliptic-curve key is needed")
    if _public(issuer.public_key()) != _public(signer.public_key()):
        raise UserError(f"{folder}: ca.key is not the key of ca.crt")
    left = (issuer.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days
    if days > left:
        raise UserError(
            f"days={days}: {folder}/ca.crt, which signs it, ends in {left} days"
        )
    key = ec.generate_private_key(ec.SECP384R1())
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    certificate = (
        _builder(_name(hosts[0][:64]), issuer.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(purpose, critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False
        )
        .add_extension(identifier, critical=False)
        .sign(signer, hashes.SHA384())
    )
    made = folder / "server.pem", folder / "server.key"
    new = [file.with_suffix(f"{file.suffix}.new") for file in made]
    new[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    _private(new[1], _pem(key))
    for written, file in zip(new, made, strict=True):  # an old pair serves until then
        written.replace(file)
    return made


def node_key(file: Path) -> Path:
    """Make a node's key pair, ``file`` and ``file.pub``, as ``ssh-keygen -t ecdsa -b 384`` does.

    Returns
    -------
    Path
        The public key, which is registered with the SuperLink.

    Raises
    ------
    UserError
        If the file is there already.
    """
    if file.exists():
        raise UserError(f"{file}: there is a key already; it is not replaced")
    file.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _private(file, private)
    shared = file.with_name(f"{file.name}.pub")
    shared.write_bytes(public + b"\n")
    return shared


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # A device whose clock is behind must not find a certificate of the future.
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise UserError(f"hosts: {host}: write it as in the DNS, xn--...") from None


def _public(key: Any) -> bytes:
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _private(file: Path, data: bytes) -> None:
    """Write what only the owner may read."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as opened:
        os.fchmod(descriptor, 0o600)  # of a file that was there already, too
        opened.write(data)


def main() -> None:
    """Make an authority, a server certificate and node keys in a folder."""
    parser = argparse.ArgumentParser(prog="python -m app.credentials")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--hosts", required=True, help="names and addresses of the SuperLink: a,b,c"
    )
    parser.add_argument("--nodes", type=int, default=0, help="how many node keys")
    parser.add_argument("--days", type=int, default=DAYS, help="how long they hold")
    given = parser.parse_args()
    try:
        if not 1 <= given.days <= MOST_DAYS:
            raise UserError(f"--days {given.days}: from 1 to {MOST_DAYS}")
        if not (given.folder / "ca.crt").exists():
            print(authority(given.folder, max(given.days, AUTHORITY_DAYS) + 1))
        hosts = [host.strip() for host in given.hosts.split(",")]
        print(*server(given.folder, hosts, given.days), sep="\n")
        for number in range(1, given.nodes + 1):
            file = given.folder / f"node-{number}"
            print(file if file.exists() else node_key(file))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
