"""Train small networks with batch normalization: one loop, and configs that each make a claim."""
