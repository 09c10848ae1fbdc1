"""The main jobs, from recipe to result: select and explain, sample and reward, train and evaluate."""
