"""Read texts from files, folders and hubs, and cut them into windows."""
