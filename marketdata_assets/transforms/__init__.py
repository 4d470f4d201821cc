"""What is derived from bars: pure functions from frame to frame."""
