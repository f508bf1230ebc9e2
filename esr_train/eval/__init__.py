"""What a run is judged by: score and KL on held-out prompts, before and after training."""
