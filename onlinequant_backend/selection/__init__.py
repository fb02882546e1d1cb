"""Which layers run in 8 bit: measured errors, measured times, and the decision."""
