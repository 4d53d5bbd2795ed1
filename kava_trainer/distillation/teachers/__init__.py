"""More than one teacher for one student: their states, and which of them a token learns from."""
