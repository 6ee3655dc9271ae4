"""Merge methods, one file each. Called, this folder is `deus_merge.api.methods`."""
