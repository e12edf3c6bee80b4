"""How run_ranks() starts ranks, waits for them and ends them."""
