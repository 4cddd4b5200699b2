"""What a step reads of what a group keeps."""
