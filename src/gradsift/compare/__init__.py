"""Methods × budgets × seeds: which choice trains better, with intervals."""
