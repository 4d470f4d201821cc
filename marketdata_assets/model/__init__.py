"""What the words mean: markets, windows of time, timeframes, bars. Imports nobody, does no I/O."""
