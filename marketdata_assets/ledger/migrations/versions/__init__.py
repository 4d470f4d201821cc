"""One script for each version of the tables, which brings the version before to it.

Scripts are never changed once they are released, and import nothing of the package: they describe
tables as they were then.
"""
