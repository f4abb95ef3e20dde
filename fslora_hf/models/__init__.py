"""What rounds do to a PEFT model: stacked client adapters, the folded base, the head, joined rows."""
