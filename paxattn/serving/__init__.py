"""Continuous batching: requests come and go while a device loop runs; see `serve_step`."""

from paxattn.serving.async_engine import AsyncEngine, Deltas, NotServing
from paxattn.serving.engine import Engine, QueueFull
from paxattn.serving.offload import HostPages, pays_from
from paxattn.serving.options import Prepared, RequestOptions
from paxattn.serving.snapshot import SnapshotError, load_state, save_state
from paxattn.serving.state import Policy, Requests, ServeState, init_serve, new_request, put, stop
from paxattn.serving.stats import EngineStats, Histogram
from paxattn.serving.step import serve, serve_step

__all__ = [
    "AsyncEngine",
    "Deltas",
    "Engine",
    "EngineStats",
    "Histogram",
    "HostPages",
    "NotServing",
    "Policy",
    "Prepared",
    "QueueFull",
    "RequestOptions",
    "Requests",
    "ServeState",
    "SnapshotError",
    "init_serve",
    "load_state",
    "new_request",
    "pays_from",
    "put",
    "save_state",
    "serve",
    "serve_step",
    "stop",
]
