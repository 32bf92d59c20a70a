"""Ordinary functions as LangChain runnables with a real sync path, a real async path, and one limit on both."""

from asyncify.adaptive import Adaptive
from asyncify.decorators import concurrency, dual
from asyncify.errors import (
    AsyncifyError,
    AsyncifyWarning,
    BlockingWarning,
    BridgedWarning,
    BridgeError,
    CheckpointError,
    DeadlockError,
    LimitTimeout,
    NameTakenError,
    PairError,
    PairNotFoundError,
    RegistryError,
    UnboundedWarning,
)
from asyncify.flow import aeach, each
from asyncify.limiter import Limiter
from asyncify.pairs import Registry, registry
from asyncify.patch import dual_patch
from asyncify.runnable import Dual
from asyncify.watches import watch

__all__ = [
    "Adaptive",
    "AsyncifyError",
    "AsyncifyWarning",
    "BlockingWarning",
    "BridgeError",
    "BridgedWarning",
    "CheckpointError",
    "DeadlockError",
    "Dual",
    "LimitTimeout",
    "Limiter",
    "NameTakenError",
    "PairError",
    "PairNotFoundError",
    "Registry",
    "RegistryError",
    "UnboundedWarning",
    "aeach",
    "concurrency",
    "dual",
    "dual_patch",
    "each",
    "registry",
    "watch",
]
