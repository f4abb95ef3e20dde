"""A round: who takes part, with which ranks and sketches, where, and what the server makes of it. Knows torch only."""
