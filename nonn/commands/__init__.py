"""What a user does around the pipeline: choose an experiment, check it, try changes, share a teacher."""
