"""Converting an EPS model into a flow model."""
