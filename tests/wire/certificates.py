"""Certificates for tests: an authority, and certificates that it signs for this machine and for clients."""

import datetime as dt
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


class Authority:
    """Signs certificates; its own is the bundle to trust."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        made = self._sign(self._name, self._key, x509.BasicConstraints(ca=True, path_length=None))
        #: Path of its certificate (PEM).
        self.bundle = str(folder / f"{name}-bundle.pem")
        Path(self.bundle).write_bytes(made.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, host: str = "127.0.0.1", password: bytes | None = None) -> tuple[str, str]:
        """Return the paths of a certificate and its key, and put both into ``{name}.pem`` as well."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self._sign(subject, key, alternative).public_bytes(serialization.Encoding.PEM)
        hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        own = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
        paths = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        paths[0].write_bytes(certificate)
        paths[1].write_bytes(own)
        self.both(name).write_bytes(own + certificate)
        return str(paths[0]), str(paths[1])

    def both(self, name: str) -> Path:
        """Return the path of the file with key and certificate."""
        return self._folder / f"{name}.pem"

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .add_extension(_usage(authority=isinstance(extension, x509.BasicConstraints)), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _usage(*, authority: bool) -> x509.KeyUsage:
    """Return the key usage of an authority, or of others."""
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
