"""`python -m pipeline gpu-check`: verify on a machine what can only be verified there (docs/gpu.md).

A check is a function that takes a `Context` and returns a `Finding`; `registry.py` lists them. Each runs in a process
of its own (`child.py`). What a check judges (a pixel source, a training step, a memory reading) is an argument of the
function that judges it, so that tests can plant a faulty one.
"""
