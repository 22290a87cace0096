"""Quality of a budget, measured on Hugging Face: tasks, the simulation of the runtime, and statistics."""
