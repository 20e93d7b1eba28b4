"""Faults let loose on trainings and whole flows, and what must hold all the same.

    make chaos                                            the whole table; hours
    make chaos BENCH="--faults kill-worker --times 2"     some of it

Each fault is one small function in the module of what it breaks: `processes`, `nodes`, `network`,
`storage`, `tracking`, `flow_runs`. It gets a `Place` (a tiny model, rows, what an undisturbed
training leaves there) and a seeded random generator, breaks something once, and returns a `Trial`:
what did not hold, if anything; how long nothing went on; how many steps had to be done again.

The oracle is equality with the undisturbed training: the same bytes for the same number of workers,
else losses that differ by at most 1e-4 of themselves. `faults` lists all faults; `test_chaos` runs
the quick ones once each.
"""
