"""The life of a run. `loop` tells the story; the other files are its rooms."""
