"""Many fits, planned in one file, run on a laptop or a cluster, and read together."""
