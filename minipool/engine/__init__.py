"""How the pool works. Private: nothing here is imported from outside the package.

From the bottom up: `states`, `table` (shared memory), `wire` (frames), `channel` (pipe ends),
`child` (inside a worker), `health` (pure policy), `handle` (one worker seen from the parent),
`turnstile` (which caller gets which worker), `fleet` (all workers), `manager` (the one thread).
"""
