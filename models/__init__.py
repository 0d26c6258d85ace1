"""What a network is: the decoder that every family shares, and one file a family."""
