"""Documents about an output: the manifest, the model card, the HTML page."""
