"""Bars for those who read them: now, as of a moment, by SQL, by a lock, and how complete they are.

Nothing here writes, except the lock file that `lock` returns.
"""
