"""Serve adapters of one network over HTTP, with Ray Serve.

- ``pool.py``: `AdapterPool` loads adapters on demand, lets the least recently used leave, and classifies mixed batches.
- ``requests.py``: what a request asks, read within bounds; the status of an error.
- ``service.py``: the answers of each path, metrics, the web page; needs no Ray.
- ``serve.py``: the command: replicas, batching and ports are Ray's; drains on SIGTERM.
"""
