"""Deadlock detection: a call that waits for itself gets a `DeadlockError`, and only when the deadlock is certain.

Read from the bottom up: `holds` finds the calls that a waiting thread or task keeps from ending, `joins` the tasks that
are awaited together; `handover` and `crews` carry both over to other threads and loops; `lookout` looks again and again
at all waits on an event loop; `proofs` decides whether a wait can never end; `detection` is what limiters call.
docs/design.md defines the terms and explains why this works.
"""
