"""What readers choose, in torch; apart from the room of readers, which is read without torch."""
