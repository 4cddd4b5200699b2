"""What readers of pages share."""
