"""The small world: data, pipelines and teachers on which everything in `scfm` runs on a laptop."""
