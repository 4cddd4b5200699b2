"""Where intermediate values lie: the buffers of a program, how long they live, their places in one arena."""
