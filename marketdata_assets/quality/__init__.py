"""Is it right? Rules on rows, agreement between answers, gaps between bars. Pure functions on
frames.
"""
