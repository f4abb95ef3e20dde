"""What happens to a client's update between its last local step and the server's sum. Knows torch only."""
