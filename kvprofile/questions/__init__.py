"""Questions about contexts, generated or brought by the user, and how an answer is judged."""
