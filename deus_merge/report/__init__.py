"""What a run says about itself: the manifest, the model card, the report."""
