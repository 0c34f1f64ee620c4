"""What the drivers of the training stages share."""
