"""Every exception and warning of the package.

    Exception
    └── AsyncifyError
        ├── PairError (TypeError)              what can't be a pair, or can't be used as one
        ├── BridgeError (RuntimeError)         a side that may not be made, or can't run in its process
        ├── RegistryError
        │   ├── NameTakenError (ValueError)    two different functions under one name
        │   └── PairNotFoundError (KeyError)   no pair of that name, or several
        ├── LimitTimeout (TimeoutError)        not admitted in time
        ├── DeadlockError (RuntimeError)       a call that waits for itself
        └── CheckpointError (ValueError)       a file that can't serve as a checkpoint

    UserWarning
    └── AsyncifyWarning
        ├── BlockingWarning                    the event loop was held
        ├── BridgedWarning                     many async calls over a side that has only threads
        └── UnboundedWarning                   many calls at once and no limit

A bad argument is a plain `ValueError` or `TypeError`, raised where it was written.
"""

__all__ = [
    "AsyncifyError",
    "AsyncifyWarning",
    "BlockingWarning",
    "BridgeError",
    "BridgedWarning",
    "CheckpointError",
    "DeadlockError",
    "LimitTimeout",
    "NameTakenError",
    "PairError",
    "PairNotFoundError",
    "RegistryError",
    "UnboundedWarning",
]


class AsyncifyError(Exception):
    """The root of every error that this package raises on its own account."""


class PairError(AsyncifyError, TypeError):
    """What is given can't be a pair, or a pair can't be a tool or a patch; raised where it is made, never at a call."""


class BridgeError(AsyncifyError, RuntimeError):
    """A side was called that `bridge="error"` forbids to make, or whose call can't go to its process and back."""


class RegistryError(AsyncifyError):
    """The registry can't do what it was asked; it is as it was before."""


class NameTakenError(RegistryError, ValueError):
    """A different function already has this name."""


class PairNotFoundError(RegistryError, KeyError):
    """No registered pair has this name, or several have it as their short name."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which hides the line breaks of a message.
        return str(self.args[0])


class LimitTimeout(AsyncifyError, TimeoutError):  # noqa: N818  (the name of the concept, as in TimeoutError itself)
    """A call was not admitted within its `timeout`, in seconds."""


class DeadlockError(AsyncifyError, RuntimeError):
    """A call waits for a slot that only its own end could give back."""


class CheckpointError(AsyncifyError, ValueError):
    """A file can't serve as this checkpoint, or can't keep what it is given."""


class AsyncifyWarning(UserWarning):
    """The root of every warning of this package: silence or raise them all by this one."""


class BlockingWarning(AsyncifyWarning):
    """Something ran on the event loop and kept it from running anything else."""


class BridgedWarning(AsyncifyWarning):
    """Many async calls went over a pair whose async side is made of threads."""


class UnboundedWarning(AsyncifyWarning):
    """Many calls of one batch were in flight at once with nothing to limit them."""
