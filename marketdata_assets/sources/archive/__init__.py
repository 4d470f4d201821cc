"""Files as a source: archives of venues, and plain CSV, become rows as a venue sends them.

A file is used whole or not at all: one that is cut short, of another market, in two units, or not
what its checksum says is refused with its name and line. Every number stays the text that it is in
the file. Which venue publishes what is in `venues`.
"""
