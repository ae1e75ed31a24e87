"""An adapter as files: its folder, its contents, the model card, and the Hub."""
