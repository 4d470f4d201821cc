"""Where bars come from: one `fetch` per request, and the guards that wrap it. Knows no storage and no
rule.
"""
