"""What is known of each venue that ccxt does not state: one file of facts a venue.

A quirk of a venue is one row in its file; a new venue is one file and one row in `registry`.
"""
