"""Facts about single layers in config.json: the forms in which configs say them, read and written."""
