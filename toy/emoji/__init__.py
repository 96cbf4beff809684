"""A text-to-emoji pipeline that trains on a laptop: a genuine FluxPipeline of 64 x 64 pixels."""
