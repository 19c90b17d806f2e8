"""The checks, in the order in which they run."""

from typing import NamedTuple

PACKAGE = "pipeline.gpu_check"


class Check(NamedTuple):
    """A check by name, the function that does it, and the time it may take on a GPU."""

    name: str
    function: str
    """"module:function"; takes a Context and returns a Finding."""
    timeout_s: float = 900.0


CHECKS = (
    Check("roi-decode", f"{PACKAGE}.pixels:check_roi_decode"),
    Check("pixels", f"{PACKAGE}.pixels:check_pixels"),
    Check("stream-order", f"{PACKAGE}.pixels:check_stream_order"),
    Check("decode-errors", f"{PACKAGE}.decode_errors:check_decode_errors"),
    Check("methods", f"{PACKAGE}.methods:check_methods"),
    Check("zero-stages", f"{PACKAGE}.stages:check_stages", 1800),
    Check("skipped-step", f"{PACKAGE}.stages:check_skipped_step", 1800),
    Check("kill-and-resume", f"{PACKAGE}.resume:check_resume", 2400),
    Check("compile", f"{PACKAGE}.compile:check_compile"),
    Check("engine-speed", f"{PACKAGE}.speed:check_speed", 7200),
    Check("loader-speed", f"{PACKAGE}.loader_speed:check_loader_speed"),
    Check("memory", f"{PACKAGE}.memory:check_memory"),
    Check("peers", f"{PACKAGE}.peers:check_peers", 1800),
    Check("checkpoint", f"{PACKAGE}.checkpoint_speed:check_checkpoint"),
    Check("network", f"{PACKAGE}.network:check_network"),
)
"""The numbers of pipeline/gpu_check's docstrings are positions in this list, from 1."""
