"""How a pool is watched: from here the table and the hooks are read, and nothing is held up.

Nothing below this package knows it; what it starts with a pool is asked for by name.
"""
