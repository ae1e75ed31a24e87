"""The front door: wrap a network, load an adapter, predict."""
