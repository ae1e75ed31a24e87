"""Norm layers, head and shortcuts, found by type; batch statistics over several processes."""
