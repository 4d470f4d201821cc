"""What is made of raw bars: rollups, one series of several venues, and Delta tables."""
