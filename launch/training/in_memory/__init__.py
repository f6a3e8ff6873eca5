"""Copies of the states in the memory of the servers, from which a job goes on after a loss.

    slots.py       a rank's two copies: files of a file system in memory, which outlive the process
    agreeing.py    of what all servers hold, the step that every shard has a holder of, and who gives what to whom
    recovery.py    copies looked for, agreed on, handed on, held against their digests, and loaded

A copy is of a rank's whole shard, so that with dp_replicate > 1 another server has it too. Storage stays what a run is
begun from: copies serve the run that made them, and go when it ends.
"""
