"""Recipe and headers -> a plan, before any tensor is read. Called, this folder is `deus_merge.api.plan`."""
