"""Commands around the pipeline: run a stage by hand, check an experiment, try changes, share a teacher."""
