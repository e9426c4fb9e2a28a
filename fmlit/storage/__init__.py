"""What a run leaves on disk: run folders, checkpoints, descriptions and exports."""
