"""What was learned, and what the paper claims: analysis, figures, replicates."""
