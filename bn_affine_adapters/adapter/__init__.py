"""The PEFT method: configuration, layer, tuner, and the rebuilding of the frozen network."""
