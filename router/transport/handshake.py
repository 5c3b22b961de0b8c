"""Who is there: mutual challenge-response over a group secret, as HELLO payloads.

Dialer: nonce, name. Acceptor: nonce, name, proof. Dialer: proof. Acceptor: welcome.
Each proof is an HMAC-SHA256 over both nonces and names, so neither side learns the secret.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

_NONCE = 32
_INSTANCE = 16
_PROOF = 32
_WELCOME = b"welcome"
MAX_NAME_BYTES = 256


class HandshakeRefused(ValueError):
    """The other side does not know the secret, has another name, or breaks the protocol."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A peer's name and the random id of this very transport (a respawn has another one)."""

    name: str
    instance: bytes

    @staticmethod
    def create(name: str) -> Identity:
        """A fresh instance. Raises ValueError for a name that does not fit a HELLO."""
        if not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"peer name {name!r}: allowed 1..{MAX_NAME_BYTES} bytes")
        return Identity(name, secrets.token_bytes(_INSTANCE))


class Handshake:
    """One side of one connection; feed HELLO payloads to `answer` until `peer` is set.

    A dialer is one with `expected`, the name it wants to reach; it sends `opening` first.
    """

    def __init__(self, identity: Identity, secret: str, expected: str | None = None) -> None:
        self.peer: Identity | None = None
        self._secret = secret.encode()
        self._expected = expected
        self._mine = secrets.token_bytes(_NONCE) + identity.instance + identity.name.encode()
        self._theirs = b""

    @property
    def opening(self) -> bytes:
        """The dialer's first payload."""
        return self._mine

    def answer(self, payload: bytes) -> bytes | None:
        """Take one payload, give the reply or None at the end. Raises HandshakeRefused."""
        return self._as_acceptor(payload) if self._expected is None else self._as_dialer(payload)

    def _as_acceptor(self, payload: bytes) -> bytes:
        if not self._theirs:
            self._identity(payload)
            self._theirs = payload
            return self._proof(b"acceptor", dialer=payload, acceptor=self._mine) + self._mine
        self._check(payload, self._proof(b"dialer", dialer=self._theirs, acceptor=self._mine))
        self.peer = self._identity(self._theirs)
        return _WELCOME

    def _as_dialer(self, payload: bytes) -> bytes | None:
        if self._theirs:
            self._check(payload, _WELCOME)
            self.peer = self._identity(self._theirs)
            return None
        proof, theirs = payload[:_PROOF], payload[_PROOF:]
        self._check(proof, self._proof(b"acceptor", dialer=self._mine, acceptor=theirs))
        peer = self._identity(theirs)
        if peer.name != self._expected:
            raise HandshakeRefused(f"dialed {self._expected!r} but {peer.name!r} answered")
        self._theirs = theirs
        return self._proof(b"dialer", dialer=self._mine, acceptor=theirs)

    def _proof(self, role: bytes, *, dialer: bytes, acceptor: bytes) -> bytes:
        # The length keeps (dialer, acceptor) from being read with another boundary.
        text = role + len(dialer).to_bytes(4, "little") + dialer + acceptor
        return hmac.digest(self._secret, text, hashlib.sha256)

    @staticmethod
    def _check(got: bytes, wanted: bytes) -> None:
        if not hmac.compare_digest(got, wanted):
            raise HandshakeRefused("wrong group secret")

    @staticmethod
    def _identity(hello: bytes) -> Identity:
        name = hello[_NONCE + _INSTANCE :]
        if not 1 <= len(name) <= MAX_NAME_BYTES:
            raise HandshakeRefused("malformed HELLO")
        return Identity(name.decode(), hello[_NONCE : _NONCE + _INSTANCE])
