"""What the network is trained to predict, and the losses."""
