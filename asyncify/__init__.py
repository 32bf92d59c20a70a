"""Ordinary functions as LangChain runnables with a real sync path, a real async path, and one limit on both."""

# First of all: with our own modules in front of it, this import takes 1.4 times as long (measured), nearly all of it
# in LangSmith's models. Why is not known.
import langchain_core.runnables.base  # noqa: F401  # pyright: ignore[reportUnusedImport]

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
