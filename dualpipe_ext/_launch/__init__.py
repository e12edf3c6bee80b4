"""How ranks are started, waited for and ended: what run_ranks() is made of."""
