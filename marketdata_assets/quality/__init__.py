"""Are the bars right? Rules on rows, agreement between answers, causes of gaps, parity, anomalies.

Pure functions on frames and values: nothing here reads or writes anything.
"""
