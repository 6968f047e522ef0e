"""The traced program and its typed parts: graphs, ops, sizes, memory, guards. Nothing here knows of growth."""
