"""Deadlock detection: a call that waits for itself is told so, and only when that is certain.

Read from the bottom up: `holds` says what a thread or a task that comes to wait keeps from ending, `joins` which tasks
are waited for together; `handover` and `crews` carry that over to other threads and loops; `lookout` looks at all who
wait on an event loop, again and again; `proofs` tells whether a wait can never end; `detection` is what limiters call.
The words, and why it works, stand in docs/design.md.
"""
