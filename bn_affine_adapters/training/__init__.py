"""Train by recipe: data, networks, replicates, sweeps."""
