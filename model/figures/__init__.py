"""The paper's figures, and some that explain what a capsule network does."""
