"""Text: read from files, folders and hubs, and cut into windows."""
