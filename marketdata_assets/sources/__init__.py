"""Where bars come from: one `fetch` per request, the guards around it, and archive files.

Nothing here stores a bar or judges one.
"""
