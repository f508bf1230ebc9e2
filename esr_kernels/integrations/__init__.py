"""`linear_reverse_kl` in other projects' trainers. Nothing here imports them before it is used."""
