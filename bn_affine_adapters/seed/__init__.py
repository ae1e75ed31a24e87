"""From (seed, name) to bits: the draws, the rule of each tensor, and the fingerprint that verifies them."""
