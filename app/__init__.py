"""fedgrad's application layer: configuration, data, processes and files."""
