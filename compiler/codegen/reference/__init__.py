"""The meaning of programs and plans in plain torch."""
