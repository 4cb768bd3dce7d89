"""What a run shows: its records, advice, and the pictures made of them."""
