"""Where images come from. A source iterates its samples in a fixed order, reads archives in place and writes
nothing."""
