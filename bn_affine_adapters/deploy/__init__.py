"""Hand an adapted network to tools that do not know this package."""
