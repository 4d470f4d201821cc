"""Whether the stored bars are right and what is missing: checks, parity, anomalies, gaps,
corrections. A check returns findings; none of them changes a bar.
"""
