"""What follows from bars: pure functions from frame to frame."""
