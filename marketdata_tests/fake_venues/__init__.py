"""Venues on loopback that speak their own wire formats, one file each."""
