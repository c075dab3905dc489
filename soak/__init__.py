"""Hours of oddities in under one: every pipeline of every recipe and configuration on data as people have it."""
