"""What the command line offers: each file keeps a command's arguments beside what it runs.

Only here are arguments parsed. A body imports what it needs when it runs.
"""
